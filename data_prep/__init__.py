"""One program a corpus: fetch, verify, convert, write a manifest.

`an4` prepares the CMU AN4 recordings and `mini_speech` generates the small corpus that is shipped; `corpus`
holds the folder format they share, and `fetch` the download and the safe unpacking.
"""
