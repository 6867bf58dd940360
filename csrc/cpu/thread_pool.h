// A small pool of persistent threads. Not OpenMP: torch ships a libgomp of its own, and two of them in one
// process have separate ideas of threads, forks and shutdown.
#pragma once

#include "../core/platform.h"

namespace gk::cpu {

// More threads than this only happen by mistake, and the stages are bound by memory long before.
constexpr int kMaxThreads = 256;

// Runs task(context, i, slot) for each i in [0, tasks), on at most `threads` <= kMaxThreads threads including the
// caller's, and returns when all are done. Slots are below `threads` and no two tasks run at one time in the same slot,
// so a slot can own scratch memory. Tasks must not throw; results must not depend on which thread runs what.
//
// Safe to call from several threads at once (the pool serves one call, the others run on their own thread) and
// in a forked child (which starts threads of its own). Fewer threads than asked for are used when the system
// refuses to create more.
using Task = void (*)(void* context, index_t index, int slot);
void parallel_for(index_t tasks, int threads, Task task, void* context) noexcept;

}  // namespace gk::cpu
