"""Write a Hugging Face folder of packed weights, which transformers and vLLM load as it is.

How matrices are packed is a `Packer`'s (`run.packer`): compressed-tensors' in `run.pack_compressed`,
bitsandbytes' in `run.pack_bitsandbytes`.
"""
