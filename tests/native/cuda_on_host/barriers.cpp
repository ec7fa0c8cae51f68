// The list of barriers that were met, and the one that is left out to see whether it is needed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "cuda_runtime.h"

namespace {

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// The barriers met so far, and where to write them.
struct BarriersMet {
  const char* path = std::getenv("HARMONIZER_LIST_BARRIERS");
  std::set<std::string> lines;
};
BarriersMet& barriers_met() {
  static BarriersMet met;
  return met;
}

}  // namespace

namespace cuda_on_host {

bool skipped(const Where& where, const char* kind) {
  static const std::string skip = [] {
    const char* value = std::getenv("HARMONIZER_SKIP_BARRIER");
    return std::string(value == nullptr ? "" : value);
  }();
  BarriersMet& met = barriers_met();
  if (skip.empty() && met.path == nullptr) return false;
  const std::string name = base_name(where.file_name()) + (":" + std::to_string(where.line()));
  if (met.path != nullptr) met.lines.insert(name + " " + kind);
  return name == skip;
}

void write_barriers_met() {
  BarriersMet& met = barriers_met();
  if (met.path == nullptr) return;
  std::FILE* file = std::fopen(met.path, "w");
  if (file == nullptr) fail("HARMONIZER_LIST_BARRIERS: cannot write %s", met.path);
  for (const std::string& line : met.lines) std::fprintf(file, "%s\n", line.c_str());
  std::fclose(file);
}

}  // namespace cuda_on_host
