// The names in the schema of an operator, at compile time: what calls what with which arguments is worked out from
// them.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace nllx {

struct Schema {
  static constexpr size_t kMost = 32;
  using Names = std::array<std::string_view, kMost>;

  std::string_view name, overload;  // of "name.overload"
  Names arguments{}, results{};
  size_t argument_count = 0, result_count = 0;

  // The place of an argument or result; kMost where there is none of that name.
  constexpr size_t argument(std::string_view wanted) const { return find(arguments, argument_count, wanted); }
  constexpr size_t result(std::string_view wanted) const { return find(results, result_count, wanted); }

 private:
  static constexpr size_t find(const Names& names, size_t count, std::string_view wanted) {
    for (size_t i = 0; i < count; ++i) {
      if (names[i] == wanted) return i;
    }
    return kMost;
  }
};

namespace schema_details {

constexpr bool is_of_name(char c) {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// "Tensor? weight=None" is called weight.
constexpr std::string_view name_of(std::string_view item) {
  size_t end = item.find('=');
  if (end == std::string_view::npos) end = item.size();
  while (end > 0 && !is_of_name(item[end - 1])) --end;
  size_t begin = end;
  while (begin > 0 && is_of_name(item[begin - 1])) --begin;
  return item.substr(begin, end - begin);
}

constexpr size_t split(std::string_view list, Schema::Names& names) {
  size_t count = 0, begin = 0;
  for (size_t i = 0; i <= list.size(); ++i) {
    if (i < list.size() && list[i] != ',') continue;
    const std::string_view name = name_of(list.substr(begin, i - begin));
    if (!name.empty()) names[count++] = name;
    begin = i + 1;
  }
  return count;
}

}  // namespace schema_details

// Every result has a name, and no default is a list.
constexpr Schema parse_schema(std::string_view text) {
  Schema schema;
  const size_t open = text.find('('), arrow = text.find(") -> ");
  const size_t dot = text.find('.');
  schema.name = text.substr(0, dot < open ? dot : open);
  if (dot < open) schema.overload = text.substr(dot + 1, open - dot - 1);
  schema.argument_count = schema_details::split(text.substr(open + 1, arrow - open - 1), schema.arguments);
  schema.result_count = schema_details::split(text.substr(arrow + 5), schema.results);
  return schema;
}

}  // namespace nllx
