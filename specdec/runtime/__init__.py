"""What the two model services share: model loading, the packed forward pass over a KV pool, picks, the
engine thread. Everything that imports torch lives here or in a service; the gateway and the SDK never
import this package, except `embedded`, which is free of torch."""
