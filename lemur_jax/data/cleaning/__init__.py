"""`lemur data clean`: composable steps that remove or change documents, each with its counts.

steps           what a step is; filters of single documents: licence, language, length, lines...
redact          secrets, e-mail and IP addresses
decontaminate   documents that share n-grams with evaluation sets
duplicates      exact and near duplicates: signatures, and which documents they make redundant
groups          equal keys of more records than memory holds
ngrams          words and their n-grams as numbers
stages          one stage of a run over one shard, in a worker process
report          what every step removed and changed, as data and as a table
clean           the run: stages in order, output directory
"""
