// This ISA's row of the dispatch table. Compiled once per ISA.
#include "kernels.h"

#define KVQ_STRING_(x) #x
#define KVQ_STRING(x) KVQ_STRING_(x)

namespace kvq {

namespace KVQ_ISA {
void store(const StoreParams&, const Runtime&);
void attend(const AttendParams&, const Runtime&);
uint32_t read(const uint8_t*, long, const Runtime&);
}  // namespace KVQ_ISA

const KernelTable KVQ_TABLE = {KVQ_STRING(KVQ_ISA), KVQ_ISA::store, KVQ_ISA::attend, KVQ_ISA::read};

}  // namespace kvq
