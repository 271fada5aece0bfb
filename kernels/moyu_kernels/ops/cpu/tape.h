// A decode step as a list of calls, to be run again on the same memory without Python, dispatch or allocation.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace moyu {

struct Tape {
  std::vector<std::function<void()>> calls;
  std::string error;
};

thread_local Tape* recording = nullptr;

// Does an op's work, and notes it down where a step is recorded. What it captures is kept as long as the tape is.
template <class F>
void perform(F work) {
  work();
  if (recording) recording->calls.emplace_back(std::move(work));
}

template <size_t... I>
void call_with(void* function, void* const* pointers, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype((void)I, static_cast<void*>(nullptr))...)>(function)(pointers[I]...);
}

constexpr size_t MOST_POINTERS = 64;

// function(pointers[0], ..., pointers[count - 1]).
template <size_t N = 1>
void call_pointers(void* function, void* const* pointers, size_t count) {
  if (count == N) return call_with(function, pointers, std::make_index_sequence<N>());
  if constexpr (N < MOST_POINTERS) call_pointers<N + 1>(function, pointers, count);
}

}  // namespace moyu

// For replay.py. A thread records one tape at a time.
extern "C" {

void moyu_tape_begin() { moyu::recording = new moyu::Tape; }

moyu::Tape* moyu_tape_end() { return std::exchange(moyu::recording, nullptr); }

// Notes down a call of a function that takes `count` pointers and returns nothing. Returns whether it could: not from a
// thread that is not recording.
bool moyu_tape_kernel(void* function, void** pointers, size_t count) {
  if (!moyu::recording || count < 1 || count > moyu::MOST_POINTERS) return false;
  std::vector<void*> kept(pointers, pointers + count);
  moyu::recording->calls.emplace_back([=] { moyu::call_pointers(function, kept.data(), kept.size()); });
  return true;
}

// Returns what went wrong, or null.
const char* moyu_tape_replay(moyu::Tape* tape) {
  try {
    for (const auto& call : tape->calls) call();
    return nullptr;
  } catch (const std::exception& error) {
    tape->error = error.what();
    return tape->error.c_str();
  }
}

void moyu_tape_free(moyu::Tape* tape) { delete tape; }
}
