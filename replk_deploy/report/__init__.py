"""Records of runs → one report, in HTML, Markdown and JSON.

`facts` reads a run folder and refuses what does not agree with itself; `sections` says it in words, tables
and pictures; `forms` writes those down. Nothing is computed on the way that the records do not hold.
"""
