package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay/engine"
)

// The orders of lanes. Lanes that are equal in it stand by provider and source.
const (
	sortSessions  = "sessions"
	sortWaiting   = "waiting"
	sortDelivered = "delivered"
	sortDeferred  = "deferred"
	sortBounced   = "bounced"
	sortOldest    = "oldest"
	sortProvider  = "provider"
)

const sortNames = "sessions, waiting, delivered, deferred, bounced, oldest or provider"

var sortings = map[string]func(a, b *engine.LaneInfo) int{
	sortSessions:  func(a, b *engine.LaneInfo) int { return cmp.Compare(b.Sessions, a.Sessions) },
	sortWaiting:   func(a, b *engine.LaneInfo) int { return cmp.Compare(b.Waiting, a.Waiting) },
	sortDelivered: func(a, b *engine.LaneInfo) int { return cmp.Compare(b.DeliveredPerSecond, a.DeliveredPerSecond) },
	sortDeferred:  func(a, b *engine.LaneInfo) int { return cmp.Compare(b.DeferredPerSecond, a.DeferredPerSecond) },
	sortBounced:   func(a, b *engine.LaneInfo) int { return cmp.Compare(b.BouncedPerSecond, a.BouncedPerSecond) },
	sortOldest: func(a, b *engine.LaneInfo) int {
		switch {
		case a.WaitingSince.IsZero() || b.WaitingSince.IsZero():
			return cmp.Compare(b.WaitingSince.Unix(), a.WaitingSince.Unix()) // those that wait come first
		}
		return a.WaitingSince.Compare(b.WaitingSince)
	},
	sortProvider: func(_, _ *engine.LaneInfo) int { return 0 },
}

// sortKeys are the keys of the live view.
var sortKeys = map[byte]string{'s': sortSessions, 'w': sortWaiting, 'd': sortDelivered, 'f': sortDeferred, 'b': sortBounced, 'o': sortOldest, 'p': sortProvider}

const keyHelp = "keys s, w, d, f, b, o and p sort by\nsessions, waiting, delivered, deferred, bounced, oldest and provider, q ends it"

// view says how lanes are shown.
type view struct {
	sorting       string
	now           time.Time
	width, height int    // of the screen; 0: no bound
	title         string // above the lanes; empty: none
	problem       string // why the lanes are old, if they are
}

// renderLanes returns the lanes as lines of text.
func renderLanes(lanes []engine.LaneInfo, v view) string {
	lanes = slices.Clone(lanes)
	slices.SortStableFunc(lanes, func(a, b engine.LaneInfo) int {
		if c := sortings[v.sorting](&a, &b); c != 0 {
			return c
		}
		return cmp.Or(strings.Compare(a.Provider, b.Provider), strings.Compare(a.Source, b.Source), strings.Compare(a.Pool, b.Pool))
	})
	rows := [][]string{{"SOURCE", "PROVIDER", "POOL", "SESS", "SENDING", "DUE", "DELIV/S", "DEFER/S", "BOUNCE/S", "OLDEST", "WAITS FOR"}}
	var lines []string
	if v.title != "" {
		lines = append(lines, v.title, totals(lanes), "")
	}
	if v.problem != "" {
		lines = append(lines, "! "+v.problem, "")
	}
	left := 0
	if most := v.height - len(lines) - 2; v.height > 0 && len(lanes) > max(0, most) { // the head and what is said of the rest
		left = len(lanes) - max(0, most)
		lanes = lanes[:max(0, most)]
	}
	for i := range lanes {
		rows = append(rows, laneRow(&lanes[i], v.now))
	}
	lines = append(lines, columns(rows)...)
	if left > 0 {
		lines = append(lines, fmt.Sprintf("… and %d more", left))
	}
	var out strings.Builder
	for _, line := range lines {
		out.WriteString(cut(line, v.width) + "\n")
	}
	return out.String()
}

// totals sums up the lanes. What is due is counted once for a pool's provider.
func totals(lanes []engine.LaneInfo) string {
	var sum engine.LaneInfo
	due := map[[2]string]int{}
	for i := range lanes {
		l := &lanes[i]
		sum.Sessions += l.Sessions
		sum.InFlight += l.InFlight
		sum.DeliveredPerSecond += l.DeliveredPerSecond
		sum.DeferredPerSecond += l.DeferredPerSecond
		sum.BouncedPerSecond += l.BouncedPerSecond
		due[[2]string{l.Pool, l.Provider}] = l.Waiting
	}
	for _, n := range due {
		sum.Waiting += n
	}
	return fmt.Sprintf("%d lanes, %d sessions, %d sending, %d due; a second %s delivered, %s deferred, %s bounced",
		len(lanes), sum.Sessions, sum.InFlight, sum.Waiting, rateText(sum.DeliveredPerSecond), rateText(sum.DeferredPerSecond), rateText(sum.BouncedPerSecond))
}

func laneRow(l *engine.LaneInfo, now time.Time) []string {
	oldest, hold := "-", "-"
	if !l.WaitingSince.IsZero() {
		oldest = ageText(now.Sub(l.WaitingSince))
	}
	if l.Hold != "" {
		hold = l.Hold
		if !l.HoldUntil.IsZero() {
			hold += ", " + ageText(l.HoldUntil.Sub(now))
		}
	}
	switch {
	case l.Reflex == "":
	case l.Hold == "":
		hold = "reflex: " + l.Reflex
	default:
		hold += "; reflex: " + l.Reflex
	}
	return []string{l.Source, l.Provider, l.Pool, fmt.Sprint(l.Sessions), fmt.Sprint(l.InFlight), fmt.Sprint(l.Waiting),
		rateText(l.DeliveredPerSecond), rateText(l.DeferredPerSecond), rateText(l.BouncedPerSecond), oldest, hold}
}

func rateText(r float64) string {
	switch {
	case r == 0:
		return "0"
	case r < 100:
		return fmt.Sprintf("%.1f", r)
	}
	return fmt.Sprintf("%.0f", r)
}

// ageText writes a span of time in at most two units.
func ageText(d time.Duration) string {
	s := int64(max(0, d) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
}

// textColumns are those that stand to the left; numbers stand to the right.
const textColumns = 3

// columns lays rows out; the last column is not filled up.
func columns(rows [][]string) []string {
	widths := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, cell := range r {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	var lines []string
	for _, r := range rows {
		var b strings.Builder
		for i, cell := range r {
			fill := strings.Repeat(" ", widths[i]-len([]rune(cell)))
			switch {
			case i == len(r)-1:
				b.WriteString(cell)
			case i < textColumns:
				b.WriteString(cell + fill + "  ")
			default:
				b.WriteString(fill + cell + "  ")
			}
		}
		lines = append(lines, b.String())
	}
	return lines
}

// cut shortens a line to a width; 0 is none.
func cut(line string, width int) string {
	if r := []rune(line); width > 0 && len(r) > width {
		return string(r[:width])
	}
	return line
}
