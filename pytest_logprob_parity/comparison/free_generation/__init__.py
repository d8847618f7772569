"""Free generation beside its golden: did the engine write the same tokens, stop where it stopped, sample as it reports?"""
