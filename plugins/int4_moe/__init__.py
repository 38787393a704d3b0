"""DeepSeekMoE over INT4 experts: routing, routed and shared experts, the weighted sum."""
