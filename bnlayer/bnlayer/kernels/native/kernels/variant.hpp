// The passes of one variant; `table.cpp` gathers them.

#pragma once

#include "passes.hpp"

namespace bnlayer::BNLAYER_VARIANT {

int64_t moments_workspace(const MomentsPass& given);
void moments(const MomentsPass& given, const Part& part, void* workspace, int64_t* limbs);
int64_t gradient_sums_workspace(const GradientSumsPass& given);
void gradient_sums(const GradientSumsPass& given, const Part& part, void* workspace, int64_t* limbs);
int64_t probe_workspace(const ProbePass& given);
void probe(const ProbePass& given, const Part& part, void* workspace, int64_t* best);
int64_t gradient_probe_workspace(const GradientProbePass& given);
void gradient_probe(const GradientProbePass& given, const Part& part, void* workspace, int64_t* best);
int64_t normalize_workspace(const NormalizePass& given);
void normalize(const NormalizePass& given, const Part& part, void* workspace);
int64_t input_gradient_workspace(const InputGradientPass& given);
void input_gradient(const InputGradientPass& given, const Part& part, void* workspace);
bool statistics(const StatisticsPass& given);
void moved(const MovedPass& given);
void coefficients(const CoefficientsPass& given);
bool gradients(const GradientsPass& given);

}  // namespace bnlayer::BNLAYER_VARIANT
