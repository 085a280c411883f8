"""One program a corpus: fetch, verify, convert, write a manifest.

Speech: `an4` prepares the CMU AN4 recordings and `mini_speech` generates the small corpus that is shipped;
`corpus` holds the folder format they share.

Captions: `karpathy` prepares any corpus of pictures and sentences in Karpathy's layout, `coco` MSCOCO, and
`mini_scenes` generates the small corpus that is shipped; `captions` holds the folder format they share, and
`features` runs an image encoder over its pictures.

`fetch` has the download and the safe unpacking.
"""
