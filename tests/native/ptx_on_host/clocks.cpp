// Vector clocks and the memory of who accessed what; clocks.h says how they find races.
#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace ptx_on_host {

void Meeting::arrive(Thread& thread) {
  if (thread.time.known &&
      std::find(known_.begin(), known_.end(), thread.time.known) == known_.end())
    known_.push_back(thread.time.known);
  arrivals_.emplace_back(thread.number, thread.time.count++);
}

void Meeting::complete(size_t threads_of_cluster) {
  auto merged = std::make_shared<std::vector<uint32_t>>(threads_of_cluster);
  for (const Knowledge& known : known_)
    for (size_t i = 0; i < threads_of_cluster; ++i)
      (*merged)[i] = std::max((*merged)[i], (*known)[i]);
  for (const auto& [number, count] : arrivals_)
    (*merged)[number] = std::max((*merged)[number], count);
  completed_ = std::move(merged);
  merged_ = std::move(known_);
  known_.clear();
  arrivals_.clear();
}

void Meeting::pass(Thread& thread) const {
  Knowledge& mine = thread.time.known;
  if (!completed_ || mine == completed_) return;
  // What a thread left here it need not be merged with.
  if (!mine || std::find(merged_.begin(), merged_.end(), mine) != merged_.end()) {
    mine = completed_;
    return;
  }
  auto both = std::make_shared<std::vector<uint32_t>>(*mine);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*completed_)[i]);
  mine = std::move(both);
}

bool Shadow::ordered(const Stamp& earlier, const Thread& thread) {
  const Cluster& cluster = *thread.block->cluster;
  if (earlier.cluster < cluster.first_serial) return true;  // nobody, or an earlier launch
  if (earlier.cluster != cluster.serial) return false;
  if (earlier.thread == thread.number) return true;
  return thread.time.known && (*thread.time.known)[earlier.thread] >= earlier.count;
}

std::string Shadow::access(const Thread& thread, size_t offset, size_t bytes, AccessKind kind,
                           bool same_content, size_t bytes_of_memory) {
  constexpr size_t kGranule = 2;
  if (cells_.empty()) cells_.resize((bytes_of_memory + kGranule - 1) / kGranule);
  const Cluster& cluster = *thread.block->cluster;
  Stamp now;
  now.cluster = cluster.serial;
  now.thread = thread.number;
  now.count = thread.time.count;
  now.pc = static_cast<uint32_t>(thread.pc);
  now.atomic = kind == AccessKind::atomic;
  for (size_t at = offset / kGranule; at <= (offset + bytes - 1) / kGranule; ++at) {
    Cell& cell = cells_[at];
    const Stamp* conflict = nullptr;
    const bool harmless = same_content || (cell.writer.atomic && now.atomic);
    if (!harmless && !ordered(cell.writer, thread)) conflict = &cell.writer;
    if (kind != AccessKind::read)
      for (const Stamp* reader : {&cell.reader, &cell.other_reader})
        if (!ordered(*reader, thread)) conflict = reader;
    if (conflict != nullptr) {
      const char* did = conflict == &cell.writer ? "written" : "read";
      const std::string who = conflict->cluster == cluster.serial
                                  ? "thread " + std::to_string(conflict->thread) + " of the cluster"
                                  : "a thread of another block";
      return std::string("a race: ") + (kind == AccessKind::read ? "reads" : "writes") +
             " what was " + did + " by " + who + " at " +
             place_of(*cluster.module, cluster.kernel->code[conflict->pc]) +
             ", and no barrier is between";
    }
    if (kind != AccessKind::read) {
      cell.writer = now;
    } else {
      const bool same_warp =
          cell.reader.cluster == now.cluster && cell.reader.thread / 32 == now.thread / 32;
      if (!same_warp) cell.other_reader = cell.reader;
      cell.reader = now;
    }
  }
  return {};
}

}  // namespace ptx_on_host
