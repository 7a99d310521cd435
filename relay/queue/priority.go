package queue

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/shared/policy"
)

// The priority of mail is stored behind the name of its stream, in envelopes and
// in records of work queues alike. To a release that knows no priorities such
// mail is of a stream of its own, in work queues of their own: it finds every
// waiting key where the envelope says, and the next release finds the priority.
// A field of its own would be lost by that release in records that it writes
// again, and then neither would agree with its envelopes.

// putStream appends the name of a stream with a priority.
func putStream(b []byte, n protowire.Number, stream string, p policy.Priority) []byte {
	if p == 0 {
		return putString(b, n, stream)
	}
	return putString(b, n, stream+policy.PriorityMark+p.String())
}

// parseStream takes them apart. What is no priority belongs to the name.
func parseStream(text []byte) (string, policy.Priority) {
	at := bytes.LastIndexByte(text, policy.PriorityMark[0])
	if at < 0 || !bytes.HasPrefix(text[at:], []byte(policy.PriorityMark)) {
		return string(text), 0
	}
	p, ok := policy.ParsePriority(string(text[at+len(policy.PriorityMark):]))
	if !ok {
		return string(text), 0
	}
	return string(text[:at]), p
}
