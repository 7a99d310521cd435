package policy

import "strconv"

// Priority of a message among those of its tenant and stream, as what it is
// above DefaultPriority or below it; so the zero value is the priority of mail
// that says none.
type Priority int8

// The range of priorities, as clients write them.
const (
	MinPriority = 0
	MaxPriority = 100
)

// PriorityOf is the priority that is written as n, MinPriority to MaxPriority.
func PriorityOf(n int) Priority { return Priority(n - DefaultPriority) }

// Number is the priority as it is written, 0 to 100.
func (p Priority) Number() int { return DefaultPriority + int(p) }

// String is the priority as it is written.
func (p Priority) String() string { return strconv.Itoa(p.Number()) }

// ParsePriority reads a priority as clients write it: a whole number from 0 to
// 100. False: it is none.
func ParsePriority(text string) (Priority, bool) {
	if text == "" || len(text) > len("100") {
		return 0, false
	}
	n := 0
	for _, c := range []byte(text) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int(c-'0')
	}
	return PriorityOf(n), n <= MaxPriority
}

// PriorityMark stands in stored records between the name of a stream and the
// priority of mail that has another one than DefaultPriority. No stream's name
// may hold it.
const PriorityMark = ";priority="

// AllowsPriority reports whether mail of the stream may have a priority.
func (r *ResolvedStream) AllowsPriority(p Priority) bool {
	return p == 0 || p.Number() >= r.MinPriority && p.Number() <= r.MaxPriority
}
