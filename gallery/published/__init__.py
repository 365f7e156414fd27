"""The published record of flow_vs_regression, its values and claims, to compare ours with."""
