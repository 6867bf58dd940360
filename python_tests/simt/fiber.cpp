#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must preserve on the old stack and restores it from the new one (System V ABI, x86-64).
extern "C" void simt_switch_stack(void** save, void* to);
asm(R"(
    .text
    .globl simt_switch_stack
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch_stack, .-simt_switch_stack
)");

namespace simt {
namespace {

constexpr std::size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 256 * 1024;  // red zones make frames large
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif
constexpr int kSavedRegisters = 6;

}  // namespace

Stack::Stack() {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, kPage, PROT_NONE);
}

Stack::~Stack() { munmap(memory_, kPage + kStackBytes); }

void Stack::prepare(Context& context, void (*entry)()) {
    void** top = reinterpret_cast<void**>(memory_ + kPage + kStackBytes);
    *--top = nullptr;  // where a return address would be: keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, kPage + kStackBytes);  // a fiber that was given up left frames behind
#endif
    context = Context{top, nullptr, memory_ + kPage, kStackBytes};
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
    simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrive([[maybe_unused]] Context& came_from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &came_from.bottom, &came_from.size);
#endif
}

}  // namespace simt
