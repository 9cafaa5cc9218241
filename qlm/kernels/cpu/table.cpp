// The kernels of one instruction set, collected.
#include "isa.h"

namespace qlm {
namespace QLM_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    {linear_float, linear_int8, linear_gptq, linear_nf4},
    low_rank_down,
    low_rank_up,
    layer_norm,
    embed,
    rotate,
    cache_store,
    attention_scratch_bytes,
    attention,
    log_sum_exp,
    all_finite,
    sum_i8,
    quantize_row_i8,
    read,
};

}  // namespace QLM_ISA
}  // namespace qlm
