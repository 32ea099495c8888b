// The loop of every pass: over the chunks of all segments together, shared out among threads.
#pragma once

#include <cstdint>

// No element depends on another; with so many arrays the compiler would not find out.
#ifdef __clang__
#define IN_ANY_ORDER _Pragma("clang loop vectorize(assume_safety)")
#else
#define IN_ANY_ORDER _Pragma("GCC ivdep")
#endif

static_assert(CHUNK % 32 == 0 && ALIGN % 32 == 0, "a word of a mask belongs to one chunk");

template <typename T>
inline T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// With fewer elements other threads would come too late to help.
constexpr int64_t ALONE = 1 << 15;
inline int threads_for(int64_t elements, int threads) { return elements > ALONE ? threads : 1; }

// Calls `work(s, start, stop)` for each chunk of each segment. A thread gets neighbouring chunks, and all threads about
// as many elements. How many threads there are changes no result: a chunk's work depends on no other chunk.
template <typename F>
void for_each_chunk(const Segment* segments, int64_t count, int threads, const F& work) {
  int64_t elements = 0;
  for (int64_t s = 0; s < count; s++) elements += segments[s].length;
  threads = threads_for(elements, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int thread = 0; thread < threads; thread++) {
    // A chunk is the thread's whose share has its first element.
    const int64_t first = elements * thread / threads, last = elements * (thread + 1) / threads;
    int64_t before = 0;
    for (int64_t s = 0; s < count && before < last; s++) {
      const int64_t length = segments[s].length;
      int64_t start = before < first ? (first - before + CHUNK - 1) / CHUNK * CHUNK : 0;
      for (; start < length && before + start < last; start += CHUNK)
        work(s, start, smaller(start + CHUNK, length));
      before += length;
    }
  }
}
