// Working memory that a calling thread keeps from call to call, so that a step allocates nothing once it is warm.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace enginery {

constexpr size_t kLine = 64;

inline size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `bytes`, aligned to a cache line, contents undefined; invalidates what was handed out before.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(kLine, round_up(bytes, kLine)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace enginery
