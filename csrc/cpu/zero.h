// Writing zeros. Where much is written, past the caches: a plain store would first read every line from memory.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <emmintrin.h>
#endif

namespace ebdiff {

class Zero {
 public:
  // bytes: of all that the caller works on, to tell what would leave the caches anyway.
  explicit Zero(int64_t bytes) : past_caches_(bytes >= (int64_t(16) << 20)) {}

  void operator()(char* to, size_t bytes) const {
#ifdef __x86_64__
    if (past_caches_ && bytes >= 256) {
      const size_t head = size_t(-reinterpret_cast<uintptr_t>(to)) & 63, body = (bytes - head) & ~size_t(63);
      std::memset(to, 0, head);
      for (size_t at = head; at < head + body; at += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
      std::memset(to + head + body, 0, bytes - head - body);
      return;
    }
#endif
    std::memset(to, 0, bytes);
  }

  // Once after the last row of a task, before another thread may read it.
  void finish() const {
#ifdef __x86_64__
    if (past_caches_) _mm_sfence();
#endif
  }

 private:
  bool past_caches_;
};

}  // namespace ebdiff
