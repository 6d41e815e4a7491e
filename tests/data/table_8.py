"""Lemur's mixture (arXiv:2310.06830, Table 8): weight % of each source."""

TABLE = {
    "python": 72.73,
    "sql": 5.15,
    "java": 1.82,
    "shell": 1.82,
    "notebook": 1.71,
    "javascript": 1.69,
    "c": 1.61,
    "php": 1.33,
    "cpp": 1.21,
    "others": 1.73,
    "refinedweb": 6.82,
    "wikipedia": 0.64,
    "books": 0.41,
    "arxiv": 0.41,
    "stackexchange": 0.41,
    "dm_mathematics": 0.41,
}
