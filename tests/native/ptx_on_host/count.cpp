// Counting; count.h says what is counted.
#include "count.h"

#include <algorithm>
#include <set>
#include <sstream>

#include "machine.h"

namespace ptx_on_host {
namespace {

constexpr uint64_t kSector = 32, kBanks = 32, kBankBytes = 4;

// Sectors of global memory that lanes touch, and as few as hold as many different bytes.
std::pair<uint64_t, uint64_t> sectors_of(const std::vector<const Access*>& accesses) {
  std::set<uint64_t> sectors, pairs;  // of bytes: nothing smaller is accessed
  for (const Access* access : accesses) {
    for (uint64_t at = access->address; at < access->address + access->bytes; at += 2)
      pairs.insert(at / 2);
    for (uint64_t at = access->address / kSector;
         at <= (access->address + access->bytes - 1) / kSector; ++at)
      sectors.insert(at);
  }
  return {sectors.size(), (2 * pairs.size() + kSector - 1) / kSector};
}

// Passes over the banks of shared memory: each gives every bank one word. Lanes that access 8 or 16
// bytes are served by halves or quarters of the warp.
std::pair<uint64_t, uint64_t> wavefronts_of(const std::vector<const Access*>& accesses) {
  const size_t lanes =
      std::max<size_t>(kBanks * kBankBytes / std::max<size_t>(accesses[0]->bytes, kBankBytes), 1);
  uint64_t passes = 0, ideal = 0;
  for (size_t first = 0; first < accesses.size(); first += lanes) {
    std::map<uint64_t, std::set<uint64_t>> words_of_bank;
    size_t words = 0, most = 0;
    for (size_t i = first; i < std::min(accesses.size(), first + lanes); ++i)
      for (uint64_t word = accesses[i]->address / kBankBytes;
           word <= (accesses[i]->address + accesses[i]->bytes - 1) / kBankBytes; ++word)
        words += words_of_bank[word % kBanks].insert(word).second;
    for (const auto& [bank, its_words] : words_of_bank) most = std::max(most, its_words.size());
    passes += most;
    ideal += (words + kBanks - 1) / kBanks;
  }
  return {passes, ideal};
}

}  // namespace

void Counts::add_traffic(PerKernel& counts, const std::vector<const Access*>& accesses) {
  const Access& first = *accesses[0];
  const bool banks = first.where == Where::shared || first.where == Where::shared_of_others;
  const auto [pieces, ideal] = banks ? wavefronts_of(accesses) : sectors_of(accesses);
  Traffic& traffic = counts.traffic[static_cast<size_t>(first.where)][first.write];
  traffic.requests += 1;
  traffic.lanes += accesses.size();
  for (const Access* access : accesses) traffic.bytes += access->bytes;
  traffic.pieces += pieces;
  traffic.ideal += ideal;
  if (pieces > ideal) counts.excess[first.pc] += pieces - ideal;
}

void Counts::add(const Cluster& cluster) {
  PerKernel& counts = kernels_[cluster.kernel->name];
  counts.kernel = cluster.kernel;
  counts.module = cluster.module;
  const size_t instructions = cluster.kernel->code.size();
  counts.thread_instructions.resize(instructions);
  counts.warp_instructions.resize(instructions);
  counts.blocks += cluster.blocks.size();
  counts.threads += cluster.threads.size();
  for (const auto& block : cluster.blocks) {
    for (size_t start = 0; start < block->threads.size(); start += 32) {
      const size_t end = std::min(start + 32, block->threads.size());
      for (size_t pc = 0; pc < instructions; ++pc) {
        uint32_t most = 0;
        for (size_t i = start; i < end; ++i) {
          const uint32_t executed = block->threads[i]->counts->executed[pc];
          counts.thread_instructions[pc] += executed;
          most = std::max(most, executed);
        }
        counts.warp_instructions[pc] += most;
      }
      // One request is what the lanes access the same time that they come to an instruction.
      std::map<std::tuple<uint32_t, uint32_t, Where>, std::vector<const Access*>> requests;
      for (size_t i = start; i < end; ++i)
        for (const Access& access : block->threads[i]->counts->accesses)
          requests[{access.pc, access.occurrence, access.where}].push_back(&access);
      for (const auto& [key, accesses] : requests) add_traffic(counts, accesses);
    }
  }
}

std::string Counts::json() const {
  static constexpr const char* places[] = {"global", "shared", "shared of others", "local"};
  std::ostringstream out;
  out << "{";
  const char* next_kernel = "";
  for (const auto& [name, counts] : kernels_) {
    out << next_kernel << "\"" << name << "\":{\"blocks\":" << counts.blocks
        << ",\"threads\":" << counts.threads << ",\"instructions\":{";
    next_kernel = ",";
    constexpr size_t kinds = static_cast<size_t>(Category::count);
    std::array<uint64_t, kinds> of_threads{}, of_warps{};
    std::map<std::pair<std::string, int>, uint64_t> of_line;
    for (size_t pc = 0; pc < counts.kernel->code.size(); ++pc) {
      const Instruction& instruction = counts.kernel->code[pc];
      const size_t kind = static_cast<size_t>(instruction.category);
      of_threads[kind] += counts.thread_instructions[pc];
      of_warps[kind] += counts.warp_instructions[pc];
    }
    for (size_t kind = 0; kind < kinds; ++kind)
      out << (kind ? "," : "") << "\"" << name_of(static_cast<Category>(kind)) << "\":["
          << of_threads[kind] << "," << of_warps[kind] << "]";
    out << "},\"traffic\":{";
    const char* next = "";
    for (size_t place = 0; place < counts.traffic.size(); ++place)
      for (const bool write : {false, true}) {
        const Traffic& traffic = counts.traffic[place][write];
        if (traffic.requests == 0) continue;
        out << next << "\"" << places[place] << (write ? " stores" : " loads")
            << "\":{\"requests\":" << traffic.requests << ",\"lanes\":" << traffic.lanes
            << ",\"bytes\":" << traffic.bytes << ",\"pieces\":" << traffic.pieces
            << ",\"ideal\":" << traffic.ideal << "}";
        next = ",";
      }
    out << "},\"excess\":{";
    for (const auto& [pc, pieces] : counts.excess) {
      const Instruction& instruction = counts.kernel->code[pc];
      const auto file = counts.module->files.find(instruction.file);
      if (file != counts.module->files.end()) of_line[{file->second, instruction.line}] += pieces;
    }
    next = "";
    for (const auto& [line, pieces] : of_line) {
      out << next << "\"" << line.first << ":" << line.second << "\":" << pieces;
      next = ",";
    }
    out << "}}";
  }
  out << "}";
  return out.str();
}

}  // namespace ptx_on_host
