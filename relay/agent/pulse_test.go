package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// watched is a pulse at work whose server is the test.
type watched struct {
	pulse
	asks  atomic.Int64
	ended chan error
	stop  context.CancelFunc
}

// watching begins to watch; answer is what happens when the server is asked.
func watching(roundTrip time.Duration, answer func(*watched) error) *watched {
	w := &watched{ended: make(chan error, 2)}
	w.begin(lookPeriod, roundTrip, func() error {
		w.asks.Add(1)
		return answer(w)
	})
	var ctx context.Context
	ctx, w.stop = context.WithCancel(context.Background())
	go func() { w.ended <- w.watch(ctx) }()
	go func() { w.ended <- w.speak(ctx) }()
	return w
}

// over ends the watch and reports the time from start to when it had found the
// server silent, 0 if it had not.
func (w *watched) over(t *testing.T, start time.Time, limit time.Duration) time.Duration {
	t.Helper()
	defer w.stop()
	select {
	case err := <-w.ended:
		if !errors.Is(err, errSilent) || !fault.Is(err, fault.Timeout) {
			t.Errorf("ended with %v", err)
		}
		return time.Since(start)
	case <-time.After(limit):
		return 0
	}
}

func TestSilentServerIsGivenUpAfter(t *testing.T) {
	for name, c := range map[string]struct {
		roundTrip, want time.Duration
	}{
		"near":     {time.Millisecond, 2500 * time.Millisecond},
		"far":      {time.Second, 4 * time.Second},
		"too far":  {time.Hour, 11 * time.Second},
		"just far": {500 * time.Millisecond, 2500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := watching(c.roundTrip, func(*watched) error { return nil })
				if took := w.over(t, time.Now(), time.Minute); took != c.want {
					t.Errorf("given up after %v, want %v", took, c.want)
				}
				if n := w.asks.Load(); n != 1 {
					t.Errorf("asked %d times", n)
				}
			})
		})
	}
}

func TestServerThatAnswersIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watching(0, func(w *watched) error {
			time.AfterFunc(1200*time.Millisecond, func() { w.spoke.Store(true) }) // a slow one
			return nil
		})
		if took := w.over(t, time.Now(), time.Hour); took != 0 {
			t.Errorf("given up after %v", took)
		}
		if n := w.asks.Load(); n < 3600/3 || n > 3600 {
			t.Errorf("asked %d times in an hour", n)
		}
	})
}

func TestServerThatSpeaksIsNotAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watching(0, func(*watched) error { return nil })
		start := time.Now()
		for time.Since(start) < time.Hour {
			time.Sleep(900 * time.Millisecond)
			w.spoke.Store(true)
		}
		if n := w.asks.Load(); n != 0 {
			t.Errorf("asked %d times", n)
		}
		if took := w.over(t, time.Now(), time.Minute); took < 2500*time.Millisecond || took > 2750*time.Millisecond {
			t.Errorf("given up %v after its last byte", took)
		}
	})
}

// TestNothingIsMissedBeforeTheQuestion holds up the question behind what else is
// being sent: as long as it is not out, no answer is due.
func TestNothingIsMissedBeforeTheQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watching(0, func(*watched) error {
			time.Sleep(20 * time.Second)
			return nil
		})
		if took := w.over(t, time.Now(), time.Minute); took != 22500*time.Millisecond {
			t.Errorf("given up after %v; the question was out after 21 s", took)
		}
	})
}

// TestLateQuestionStartsAnew lets the server speak while the question is held up.
func TestLateQuestionStartsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := true
		w := watching(0, func(w *watched) error {
			if first {
				first = false
				time.AfterFunc(time.Second, func() { w.spoke.Store(true) })
				time.Sleep(1100 * time.Millisecond)
			}
			return nil
		})
		// Silent since 2 s, seen at 2.25 s: asked at 3.25 s, given up at 4.75 s.
		if took := w.over(t, time.Now(), time.Minute); took < 4500*time.Millisecond || took > 4750*time.Millisecond {
			t.Errorf("given up after %v", took)
		}
		if n := w.asks.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestQuestionThatFailsEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		w := watching(0, func(*watched) error { return broken })
		if err := <-w.ended; !errors.Is(err, broken) {
			t.Errorf("ended with %v", err)
		}
		w.stop()
	})
}
