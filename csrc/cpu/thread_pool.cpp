#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace gk::cpu {
namespace {

// IEEE arithmetic inside the kernels, whatever torch.set_flush_denormal or another library left in this thread.
class IeeeArithmetic {
 public:
#if defined(__SSE__)
    IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
    unsigned saved_;
#else
    IeeeArithmetic() {}
    ~IeeeArithmetic() {}
#endif
 public:
    IeeeArithmetic(const IeeeArithmetic&) = delete;
    IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
};

struct Job {
    index_t tasks;
    Task task;
    void* context;
    std::atomic<index_t> next{0};

    void run(int slot) {
        const IeeeArithmetic ieee;
        for (index_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(context, i, slot);
    }
};

class Pool {
 public:
    // False when another caller has the pool.
    bool try_run(Job& job, int threads) {
        const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner) return false;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            job_ = &job;
            tickets_ = std::min(threads - 1, workers_);
        }
        wake_.notify_all();
        job.run(0);
        std::unique_lock<std::mutex> lock(mutex_);
        tickets_ = 0;  // a worker that wakes up only now finds nothing left, and the caller need not wait for it
        done_.wait(lock, [this] { return active_ == 0; });
        return true;
    }

 private:
    void grow(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
        } catch (const std::exception&) {
            // The system is out of threads or memory: fewer threads give the same results.
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return tickets_ > 0; });
            const int slot = tickets_--;
            Job& job = *job_;
            ++active_;
            lock.unlock();
            job.run(slot);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_;  // held by the one caller whose job the workers share
    std::mutex mutex_;  // guards everything below
    std::condition_variable wake_;
    std::condition_variable done_;
    Job* job_ = nullptr;
    int workers_ = 0;
    int tickets_ = 0;  // workers that may still join; its value is also the next one's slot
    int active_ = 0;
};

// Never destroyed: its threads are asleep in it when the process exits, and joining them there could hang.
Pool* pool = new Pool;

// A forked child has a copy of the pool but none of its threads, and perhaps a lock that nobody will release.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel_for(index_t tasks, int threads, Task task, void* context) noexcept {
    Job job{tasks, task, context};
    const int useful = static_cast<int>(std::min<index_t>(tasks, threads));
    if (useful <= 1 || !pool->try_run(job, useful)) job.run(0);
}

}  // namespace gk::cpu
