"""Messages about parameters that wrappers have flattened, as patterns."""

REMEDY = r"use fully_shard \(FSDP2\), DistributedDataParallel or ZeRO stage 0 instead; .*galore_kernels.prepare"
FLATTENED = rf'"\S+"\): expected an unflattened parameter, got one of shape \S.*\(FSDP1\) has flattened.*{REMEDY}'
PARTITIONED = rf"expected an unflattened parameter, got one of shape .* DeepSpeed ZeRO 3 has partitioned.*{REMEDY}"
REPLACED = rf"got a flat tensor of shape \(\d+,\) in the place of all matrices, which DeepSpeed does.*{REMEDY}"
LEFT_BEHIND = rf'"\S+"\): expected a parameter of the model, got one .*\(FSDP1\) has flattened into another.*{REMEDY}'
AFTERWARDS = rf"one of shape .* that DeepSpeed ZeRO trains a flattened copy of.*{REMEDY}"
