"""Scores of large collections: `ntf score`, which goes on after a kill and writes one file of rows.

    command     the options, and the order in which things happen
    sources     which pictures a folder, a list, a table or tar shards name
    tar_shards  members of one shard
    listing     these pictures in a file, numbered, so that memory stays flat
    work        the folder beside the results: configuration, parts that are done, the step to the finished file
    rows        one row for each picture
    results     rows to CSV, JSON lines or Parquet
    local       pictures to rows in this process
    on_ray      the same on a Ray cluster
    progress    what is shown meanwhile

Nothing here is imported by the rest of `runtime` but `command`, by the command line.
"""
