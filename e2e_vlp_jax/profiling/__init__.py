"""What a program costs: FLOPs and bytes, time by module, chips' data sheets."""
