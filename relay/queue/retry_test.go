package queue

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func minutes(m ...int) (out []policy.Duration) {
	for _, n := range m {
		out = append(out, policy.Duration(time.Duration(n)*time.Minute))
	}
	return out
}

func TestRetryWaits(t *testing.T) {
	p := policy.Queue{Retry: minutes(5, 10, 20, 30), RetryMax: policy.Duration(4 * time.Hour)}
	now := time.UnixMilli(1_800_000_000_000)
	far := now.Add(1000 * time.Hour)
	for _, tc := range []struct {
		attempts uint32
		want     time.Duration
	}{
		{0, 5 * time.Minute}, {1, 5 * time.Minute}, {2, 10 * time.Minute}, {3, 20 * time.Minute}, {4, 30 * time.Minute},
		{5, time.Hour}, {6, 2 * time.Hour}, {7, 4 * time.Hour}, {8, 4 * time.Hour}, {4_000_000_000, 4 * time.Hour},
	} {
		at, ok := RetryAt(p, ids.Message{}, tc.attempts, now, far)
		if !ok || at.Sub(now) != tc.want {
			t.Errorf("after attempt %d: %v, %v, want %v", tc.attempts, at.Sub(now), ok, tc.want)
		}
	}
	if at, ok := RetryAt(policy.Queue{}, ids.Message{}, 1, now, far); !ok || at.Sub(now) != 4*time.Hour {
		t.Errorf("an empty schedule gives %v, %v", at.Sub(now), ok)
	}
}

func TestRetryKeepsTheLastTryBeforeTheDeadline(t *testing.T) {
	p := policy.Queue{Retry: minutes(5, 10), RetryMax: policy.Duration(4 * time.Hour)}
	now := time.UnixMilli(1_800_000_000_000)
	for _, tc := range []struct {
		left time.Duration // until the deadline
		want time.Duration // wait; 0: no further try
	}{
		{6 * time.Minute, 5 * time.Minute},
		{5 * time.Minute, 3 * time.Minute}, // the wait ends on the deadline: moved in front of it
		{4 * time.Minute, 2 * time.Minute},
		{2*time.Minute + time.Second, time.Second},
		{2 * time.Minute, 0},
		{time.Second, 0},
		{-time.Hour, 0},
	} {
		at, ok := RetryAt(p, ids.Message{}, 1, now, now.Add(tc.left))
		if ok != (tc.want > 0) || ok && at.Sub(now) != tc.want {
			t.Errorf("%v before the deadline: %v, %v, want %v", tc.left, at.Sub(now), ok, tc.want)
		}
	}
}

func TestRetryProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := policy.Queue{
			RetryMax:           policy.Duration(rapid.Int64Range(0, int64(48*time.Hour)).Draw(t, "max")),
			RetryJitterPercent: rapid.IntRange(-5, 120).Draw(t, "jitter"),
		}
		for range rapid.IntRange(0, 6).Draw(t, "entries") {
			p.Retry = append(p.Retry, policy.Duration(rapid.Int64Range(0, int64(8*time.Hour)).Draw(t, "wait")))
		}
		now := time.UnixMilli(rapid.Int64Range(0, 4_000_000_000_000).Draw(t, "now"))
		deadline := now.Add(time.Duration(rapid.Int64Range(-int64(time.Hour), int64(120*time.Hour)).Draw(t, "left")))
		var id ids.Message
		copy(id[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
		attempts := rapid.Uint32().Draw(t, "attempts")
		at, ok := RetryAt(p, id, attempts, now, deadline)
		if again, ok2 := RetryAt(p, id, attempts, now, deadline); ok != ok2 || !again.Equal(at) {
			t.Fatal("the same question has two answers")
		}
		if !ok {
			if deadline.Sub(now) > lastTryMargin+minRetryWait {
				t.Fatalf("no try although the deadline is %v away", deadline.Sub(now))
			}
			return
		}
		if !at.Before(deadline) || at.Sub(now) < minRetryWait {
			t.Fatalf("tried %v after now, %v before the deadline", at.Sub(now), deadline.Sub(at))
		}
		base := retryWait(p, max(attempts, 1))
		j := float64(min(max(p.RetryJitterPercent, 0), 100)) / 100
		most := max(time.Duration(float64(base)*(1+j))+time.Millisecond, minRetryWait)
		if at.Sub(now) > most {
			t.Fatalf("waits %v, the schedule allows %v", at.Sub(now), most)
		}
	})
}

func TestRetryJitterSpreadsMessagesAndKeepsRecipientsTogether(t *testing.T) {
	p := policy.Queue{Retry: minutes(100), RetryMax: policy.Duration(4 * time.Hour), RetryJitterPercent: 20}
	now := time.UnixMilli(1_800_000_000_000)
	var low, high int
	for i := range 1000 {
		var id ids.Message
		id[6], id[15] = byte(i), byte(i>>8)
		at, _ := RetryAt(p, id, 1, now, now.Add(100*time.Hour))
		switch wait := at.Sub(now); {
		case wait < 80*time.Minute || wait > 120*time.Minute:
			t.Fatalf("waits %v, outside 100 min ± 20 %%", wait)
		case wait < 90*time.Minute:
			low++
		case wait > 110*time.Minute:
			high++
		}
	}
	if low < 180 || low > 320 || high < 180 || high > 320 {
		t.Errorf("%d waits in the lowest quarter and %d in the highest of 1000: not spread evenly", low, high)
	}
}
