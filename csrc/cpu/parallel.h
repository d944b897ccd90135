// Threads: those of the OpenMP runtime that torch has loaded already, found at run time, so that there is one pool in the
// process and never more threads than torch.set_num_threads allows. Without it (another platform), threads of our own.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace ebdiff {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline GompParallel gomp_parallel() {
#ifdef _WIN32
  return nullptr;
#else
  // libgomp, and under this name libomp and libiomp5 too. Looked up by name: linking would bring in a second pool.
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

// Call body(i) for i in [0, count), on at most `threads` threads; who does which is left open.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = int(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    const Body& body;
  } shared{{0}, count, body};
  void (*work)(void*) = [](void* given) {
    auto& mine = *static_cast<Shared*>(given);
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) mine.body(i);
  };
  if (const GompParallel pool = gomp_parallel()) {
    pool(work, &shared, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &shared);
  work(&shared);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace ebdiff
