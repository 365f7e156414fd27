"""Which model serves the learner that learns from it?"""
