// Fibers: stacks that one thread switches between, by hand, and known to AddressSanitizer.
#pragma once

#include <cstddef>

namespace simt {

// A place that can be switched to.
struct Context {
    void* stack_pointer = nullptr;
    // What AddressSanitizer has to know of the stack.
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    std::size_t size = 0;
};

// A stack with a guard page below it.
class Stack {
 public:
    Stack();
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // The context's first switch enters `entry`, which never returns.
    void prepare(Context& context, void (*entry)());

 private:
    char* memory_;
};

// Goes on at `to`; returns when someone switches back to `from`. `from_ends`: nobody will.
void switch_context(Context& from, Context& to, bool from_ends = false);

// To be called first by an entry: where it came from.
void arrive(Context& came_from);

}  // namespace simt
