// Numbers and shapes as text for messages, which read as if they had been printed to a std::ostream.
//
// A process may hold several copies of libstdc++: torch brings or finds one, other packages bring their own. Where they
// are mixed up, a std::ostream in this extension fails to find how to print a number: integers come out blank, and an
// IntArrayRef ends the process. Text is printed without that search. So no message hands a number, sizes or strides to
// a stream; each is first made a string here, by functions that use no stream either. A device becomes one by str().
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>

namespace nllx {

// An integer of any type: std::ostream takes them all, and beside `double` an int64_t alone would be ambiguous.
template <typename Integer>
inline std::string number(Integer value) {
  static_assert(std::is_integral_v<Integer>);
  return std::to_string(value);
}

// Six digits, as a std::ostream prints by default.
inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// As c10 prints sizes and strides: "[2, 3]".
inline std::string list(at::IntArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text += ']';
}

}  // namespace nllx
