"""Why: from a comparison that failed to the cause. `reference_evaluation` needs an independent implementation, `ablation` an engine."""
