package fault

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestErrorShowsFieldAndFixButPublicHidesTheCause(t *testing.T) {
	e := Field("policy.Parse", "queue.retry[2]", "is %ds, write at least %ds", 1, 5)
	e.Cause = io.ErrUnexpectedEOF
	if got, want := e.Error(), "policy.Parse: queue.retry[2]: is 1s, write at least 5s: unexpected EOF"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
	wrapped := fmt.Errorf("outer: %w", e)
	if got, want := Public(wrapped), "queue.retry[2]: is 1s, write at least 5s"; got != want {
		t.Errorf("Public() = %q, want %q", got, want)
	}
	if !errors.Is(wrapped, io.ErrUnexpectedEOF) {
		t.Error("the cause is lost")
	}
}

func TestKindOf(t *testing.T) {
	for _, tc := range []struct {
		err       error
		kind      Kind
		temporary bool
	}{
		{New(NoSpace, "op", "full"), NoSpace, true},
		{New(Denied, "op", "no"), Denied, false},
		{Wrap(io.EOF, Unavailable, "op", "away"), Unavailable, true},
		{&Error{Kind: Invalid, Retry: RetryLater}, Invalid, true},
		{&Error{Kind: Internal, Retry: RetryNever}, Internal, false},
	} {
		if got := KindOf(fmt.Errorf("x: %w", tc.err)); got != tc.kind {
			t.Errorf("KindOf(%v) = %v, want %v", tc.err, got, tc.kind)
		}
		var e *Error
		if !errors.As(tc.err, &e) || e.Temporary() != tc.temporary {
			t.Errorf("%v: Temporary() != %v", tc.err, tc.temporary)
		}
	}
	if KindOf(io.EOF) != Internal || Public(io.EOF) == io.EOF.Error() {
		t.Error("a foreign error must be internal and must not leak its text")
	}
	if Wrap(nil, Internal, "op", "x") != nil {
		t.Error("Wrap(nil) must be nil")
	}
}
