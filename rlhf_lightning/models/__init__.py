"""Language models: loading, the policy, frozen references, tokenizers."""
