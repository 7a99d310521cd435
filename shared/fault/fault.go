// Package fault is the one error type of Relais. An error that a person or a
// peer may see is made here, close to where it is found, with what went wrong
// and how to mend it; the edges (SMTP, HTTP, the relay link, the command line)
// translate its Kind into their own codes and show its Public text. Everything
// else about the error stays in the logs.
package fault

import (
	"errors"
	"fmt"
)

// Kind says what sort of failure it is. Kinds are append-only: they travel in
// link messages and API answers.
type Kind uint8

// The kinds. The comment gives the HTTP status and the SMTP reply class that
// the edges use.
const (
	Internal        Kind = iota // our own defect or an unexpected cause: 500, 451 4.3.0
	Invalid                     // the request is malformed or breaks a rule: 422, 550/554
	NotFound                    // the named thing does not exist: 404, 550
	Conflict                    // the revision moved, or the state forbids it: 409, 451
	Exists                      // the name or address is taken: 409
	Unauthenticated             // no or wrong credentials: 401, 535 5.7.8
	Denied                      // known, but not allowed: 403, 550 5.7.1
	Exhausted                   // a limit is reached: 429, 452/421
	NoSpace                     // storage is full or reserved: 507, 452 4.3.1
	Unavailable                 // a part we need is away for now: 503, 451 4.3.2
	Timeout                     // a deadline passed: 504, 451 4.4.1
	TooLarge                    // over a size limit: 413, 552 5.3.4
)

var kindNames = [...]string{
	"internal", "invalid", "not-found", "conflict", "exists", "unauthenticated",
	"denied", "exhausted", "no-space", "unavailable", "timeout", "too-large",
}

// String returns the stable name of the kind.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Retry says whether trying the same thing again can help.
type Retry uint8

// The retry classes.
const (
	RetryDefault Retry = iota // derived from the kind, see Temporary
	RetryNever                // the same request will fail again
	RetryLater                // may succeed later without a change to the request
)

// Error is the error type. The zero value is not useful; use New, Wrap or Field.
type Error struct {
	Kind   Kind
	Op     string // operation that failed: "package.Operation"
	Field  string // offending field, limit or flag in the user's own words; may be empty
	Public string // one plain sentence for the user: what is wrong and the fix; holds no secret
	Retry  Retry
	Cause  error // for logs only; never shown to a peer
}

// New returns an error with a public text.
func New(kind Kind, op, public string, args ...any) *Error {
	return &Error{Kind: kind, Op: op, Public: fmt.Sprintf(public, args...)}
}

// Field returns an Invalid error about one named field.
func Field(op, field, public string, args ...any) *Error {
	return &Error{Kind: Invalid, Op: op, Field: field, Public: fmt.Sprintf(public, args...)}
}

// Wrap gives cause a kind, an operation and a public text. A nil cause returns nil.
func Wrap(cause error, kind Kind, op, public string, args ...any) error {
	if cause == nil {
		return nil
	}
	return &Error{Kind: kind, Op: op, Public: fmt.Sprintf(public, args...), Cause: cause}
}

// Error returns operation, field, public text and cause on one line, for logs
// and for the command line.
func (e *Error) Error() string {
	s := e.Public
	if e.Field != "" {
		s = e.Field + ": " + s
	}
	if e.Op != "" {
		s = e.Op + ": " + s
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Temporary reports whether the same request may succeed later.
func (e *Error) Temporary() bool {
	switch e.Retry {
	case RetryNever:
		return false
	case RetryLater:
		return true
	}
	switch e.Kind {
	case Internal, Exhausted, NoSpace, Unavailable, Timeout, Conflict:
		return true
	}
	return false
}

// KindOf returns the kind of the first Error in err's chain, or Internal.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

// Is reports whether err's chain holds an Error of the kind.
func Is(err error, kind Kind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}

// Public returns the text to show for err, with the field in front if there is
// one. An error that is not ours yields a sentence that gives nothing away.
func Public(err error) string {
	var e *Error
	if !errors.As(err, &e) {
		return "internal error, see the log"
	}
	if e.Field != "" {
		return e.Field + ": " + e.Public
	}
	return e.Public
}
