"""Why: from a comparison that failed to the cause. `reading` needs a third opinion, `ablation` an engine."""
