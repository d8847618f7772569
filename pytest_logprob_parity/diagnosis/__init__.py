"""Why: from a comparison that failed to the cause. `reference_evaluation` needs transformers, `ablation` an engine."""
