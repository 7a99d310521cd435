package service

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

func TestBrakesOfPeople(t *testing.T) {
	f := newFixture(t)
	if _, err := f.SetBrake(ctx, viewer, BrakeRequest{Provider: "google", Cause: "x"}, Change{}); !fault.Is(err, fault.Denied) {
		t.Errorf("a viewer: %v", err)
	}
	for field, req := range map[string]BrakeRequest{
		"scope":    {Cause: "x"},
		"provider": {Provider: "gmail", Cause: "x"},
		"pool":     {Pool: "nowhere", Cause: "x"},
		"ip":       {Source: "192.0.2.9", Cause: "x"},
		"tenant":   {Tenant: "nobody", Cause: "x"},
		"domain":   {Domain: "-", Cause: "x"},
		"cause":    {Provider: "google"},
		"percent":  {Provider: "google", Cause: "x", Percent: 100},
		"ttl":      {Provider: "google", Cause: "x", TTL: -time.Second},
	} {
		_, err := f.SetBrake(ctx, operator, req, Change{})
		if e, ok := err.(*fault.Error); !ok || e.Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
	f.refused(t, fault.Invalid, "cause", func() error {
		_, err := f.SetBrake(ctx, operator, BrakeRequest{Provider: "google", Cause: strings.Repeat("x", 5000)}, Change{})
		return err
	})
	b, err := f.SetBrake(ctx, operator, BrakeRequest{Provider: "mx:example.net", Domain: "Example.ORG", Percent: 10, Cause: " complaints ", TTL: time.Hour}, Change{})
	if err != nil {
		t.Fatal(err)
	}
	if b.Owner != operator.Name || b.Cause != "complaints" || b.Scope.Domain != "example.org" || b.Until.Sub(b.CreatedAt) != time.Hour || b.Automatic {
		t.Errorf("%+v", b)
	}
	if b, err = f.PinBrake(ctx, operator, b.ID.String(), true, Change{Reason: "audit"}); err != nil || !b.Pinned {
		t.Fatal(b, err)
	}
	if err := f.SweepBrakes(ctx, time.Now().Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if list, err := f.Brakes(viewer, false); err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if b, err = f.CancelBrake(ctx, operator, b.ID.String(), Change{Reason: "done"}); err != nil || b.EndedBy != operator.Name || b.EndReason != "done" {
		t.Fatal(b, err)
	}
	if list, err := f.Brakes(viewer, false); err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	if list, err := f.Brakes(viewer, true); err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	var audited []string
	entries, err := f.Audit(operator, AuditFilter{Limit: 10, Object: b.ID.String()})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		audited = append(audited, e.Actor+" "+e.Action)
	}
	if got := strings.Join(audited, ","); got != "olga brake.cancel,olga brake.pin,olga brake.set" {
		t.Errorf("audited: %s", got)
	}
}

func TestReflexesOfRelaysAreShownAsBrakes(t *testing.T) {
	f := newFixture(t)
	src, err := f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("192.0.2.7"), EHLO: "mta.example.net"}, Change{})
	if err != nil {
		t.Fatal(err)
	}
	node := ids.Node{7}
	told := func(at time.Time) []Reflex {
		return []Reflex{{Source: src.ID, Provider: "google", Phase: "held", Class: "ip-block", Reply: "550 5.7.1\r\nno", CauseAt: at, Since: at}}
	}
	note := func(reflexes []Reflex) {
		t.Helper()
		f.seenMu.Lock()
		f.seen[node] = &Seen{Connected: true, LastContact: time.Now(), Report: &ReportInfo{Reflexes: reflexes}}
		f.seenMu.Unlock()
		if err := f.NoteReports(ctx); err != nil {
			t.Fatal(err)
		}
	}
	inForce := func() []BrakeView {
		t.Helper()
		list, err := f.Brakes(viewer, false)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	at := time.Now().Truncate(time.Millisecond) // as relays tell it, and the log keeps it
	note(told(at))
	list := inForce()
	if len(list) != 1 || list[0].Owner != control.BrakeReflex || list[0].Node != node || list[0].Percent != 0 || list[0].Evidence != "550 5.7.1  no" {
		t.Fatalf("%+v", list)
	}
	logged := len(f.log.bytes)
	note(told(at.Add(time.Second)))
	if len(f.log.bytes) != logged {
		t.Error("what is known already was logged again")
	}
	if _, err := f.CancelBrake(ctx, operator, list[0].ID.String(), Change{}); err != nil {
		t.Fatal(err)
	}
	note(told(at))
	if list := inForce(); len(list) != 0 {
		t.Errorf("set again by the same evidence: %+v", list)
	}
	note(told(time.Now().Add(time.Second)))
	if list := inForce(); len(list) != 1 {
		t.Errorf("not set by new evidence: %+v", list)
	}
	note(nil)
	if list := inForce(); len(list) != 0 {
		t.Errorf("the lane is free again: %+v", list)
	}
	// It was out of the report for a while, and nobody has said that it is well: its
	// relay was cut off, or tells of lanes that were slowed down before.
	again := []Reflex{{Source: src.ID, Provider: "yahoo", Phase: "slowed", Class: "throttled", CauseAt: at.Add(-time.Minute), Since: at.Add(-time.Minute)}}
	for range 2 {
		note(again)
		if list := inForce(); len(list) != 1 || list[0].Scope.Provider != "yahoo" {
			t.Errorf("a lane that is slowed down is not shown: %+v", list)
		}
		note(nil)
	}
	if long := oneLine(strings.Repeat("é", command.MaxEvidenceBytes), command.MaxEvidenceBytes); len(long) > command.MaxEvidenceBytes {
		t.Error(len(long))
	}
}
