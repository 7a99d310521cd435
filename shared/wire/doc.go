// Package wire is the language between relays and control: frames, messages
// and the encoding of a relay's view. It exists apart from the transport
// (shared/link) and from both ends so that the bytes have one definition, which
// golden files hold still. Version 1: a frame is a length (u32), a type (u16),
// both big-endian, and a protobuf message of wire.proto, 1 MiB at most in all.
package wire
