"""Networks: policy, critic, LoRA, packed attention, FSDP2 sharding and the sampling snapshot."""
