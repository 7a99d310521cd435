package main

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/queue"
)

// TestConfirm: what is gone afterwards is asked for at a terminal; a program
// has to say --yes when it means everything.
func TestConfirm(t *testing.T) {
	for name, tc := range map[string]struct {
		ends, yes, all, human bool
		answer                string
		ok, usage             bool
	}{
		"retry":                  {ok: true},
		"purge by a program":     {ends: true, ok: true},
		"all by a program":       {ends: true, all: true, usage: true},
		"all by a program, sure": {ends: true, all: true, yes: true, ok: true},
		"person says yes":        {ends: true, human: true, answer: "yes\n", ok: true},
		"person says no":         {ends: true, human: true, answer: "no\n"},
		"person says y":          {ends: true, human: true, answer: "y\n"},
		"person says nothing":    {ends: true, human: true},
		"person was sure before": {ends: true, human: true, all: true, yes: true, ok: true},
	} {
		r, w, err := os.Pipe()
		if err == nil {
			_, err = w.WriteString(tc.answer)
		}
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		a := queueAction{action: queue.ActionPurge, ends: tc.ends, yes: tc.yes, in: r, isHuman: func(*os.File) bool { return tc.human }}
		a.op.All = tc.all
		err = a.confirm()
		var usage usageError
		if (err == nil) != tc.ok || errors.As(err, &usage) != tc.usage {
			t.Errorf("%s: %v", name, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if atTerminal(null) {
		t.Error("the null device is not a person")
	}
	if err := null.Close(); err != nil {
		t.Error(err)
	}
}

func TestEndOfRule(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"": {}, "2h": now.Add(2 * time.Hour), "3d": now.Add(72 * time.Hour), "2026-03-02T00:00:00Z": now.Add(12 * time.Hour),
	} {
		if got, err := endOf(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	var usage usageError
	if _, err := endOf("tomorrow", now); !errors.As(err, &usage) {
		t.Errorf("tomorrow: %v", err)
	}
}
