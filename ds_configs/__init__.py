"""DeepSpeed configuration files, literal JSON; `scbench pretrain --deepspeed zero2` names one of them."""
