"""Know before the job runs: step time, memory and cost of every layout, and the best of them.

Reading order: job, hardware; shape, kernels, links, bubble, step_time, memory; configured (a configuration), risks,
search; economics, calibration, explain, report, picture. Against published runs: rows, fit, evaluation.
"""
