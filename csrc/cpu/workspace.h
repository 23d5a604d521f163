// The memory of one call.
#pragma once

#include <cstdlib>

namespace kvq {

// Only grows: a decode step must not pay page faults. Compiled once, not per ISA.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();
  // Uninitialised, 64-byte aligned, what it held before is lost. Throws std::bad_alloc.
  void* reserve(long bytes);
  long size() const { return size_; }

 private:
  void* data_ = nullptr;
  long size_ = 0;
};

}  // namespace kvq
