// The router's product of a row: floats of 16 inputs each, added up as whole numbers of 2^-32, so that they may come in any order. The inputs
// are the residual stream's times the norm's weight; 1 / rms comes last. Sums stay below 2^31 in size.
#pragma once
#include "common.cuh"

constexpr float LOGIT_UNITS = 4294967296.f;

DEVICE float quad_product(const float4& x, const float4& weight) {
    return __fmaf_rn(x.w, weight.w, __fmaf_rn(x.z, weight.z, __fmaf_rn(x.y, weight.y, __fmul_rn(x.x, weight.x))));
}

// The sum over 16 inputs, of four neighbouring lanes' quads.
DEVICE u64 fixed_logit(float quad) {
    quad += __shfl_xor_sync(0xffffffffu, quad, 1);
    quad += __shfl_xor_sync(0xffffffffu, quad, 2);
    return u64(__float2ll_rn(quad * LOGIT_UNITS));
}

DEVICE float logit_of(u64 sum, float rms) { return __ll2float_rn((long long)(sum)) * (1.f / LOGIT_UNITS) * rms; }
