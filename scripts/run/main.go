// Command run starts Relais in the lab: one control server, two relays and
// simulated providers, all on loopback, and sends a sample stream. It is what
// `make run` calls; README.md tells its options.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// Defaults and bounds.
const (
	defaultMessages = 200
	maxMessages     = 1_000_000
	defaultSize     = 2 << 10
	connections     = 50
	relays          = 2
	sourcesPerRelay = 4
	finalTimeout    = 15 * time.Minute
	trickle         = 10 // messages a second while it runs on
)

type options struct {
	bin  string
	dir  string
	n    int
	exit bool
	size int
	dkim bool
	open bool
	seed uint64
}

func main() {
	o, err := parse()
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// parse reads the flags; make passes variables that are not set as empty.
func parse() (*options, error) {
	var n, exit, size, dkim, labMode, seed string
	o := &options{}
	flag.StringVar(&o.bin, "bin", "bin", "directory with the binaries")
	flag.StringVar(&o.dir, "dir", "", "directory for data, logs and mail (default: a new one in the temporary directory)")
	flag.StringVar(&n, "n", "", "messages of one recipient to send (default 200)")
	flag.StringVar(&exit, "exit", "", "1: end when every message has a final state")
	flag.StringVar(&size, "size", "", "bytes of a message, such as 10k (default 2k)")
	flag.StringVar(&dkim, "dkim", "", "off: do not sign")
	flag.StringVar(&labMode, "lab", "", "open: providers without limits and faults")
	flag.StringVar(&seed, "seed", "", "chooses faults and recipients (default 1)")
	flag.Parse()
	o.exit, o.dkim, o.open = exit != "" && exit != "0", dkim != "off", labMode == "open"
	var err error
	if o.n, err = number("N", n, defaultMessages, 1, maxMessages); err != nil {
		return nil, err
	}
	if o.size, err = number("SIZE", size, defaultSize, 256, 20<<20); err != nil {
		return nil, err
	}
	s, err := number("SEED", seed, 1, 0, 1<<31)
	o.seed = uint64(s)
	if labMode != "" && labMode != "open" && labMode != "realistic" {
		return nil, fault.Field("run", "LAB", "is %q; write open or realistic", labMode)
	}
	return o, err
}

func number(name, text string, fallback, least, most int) (int, error) {
	if text == "" {
		return fallback, nil
	}
	factor := 1
	switch lower := strings.ToLower(text); {
	case strings.HasSuffix(lower, "k"):
		factor, text = 1<<10, text[:len(text)-1]
	case strings.HasSuffix(lower, "m"):
		factor, text = 1<<20, text[:len(text)-1]
	}
	v, err := strconv.Atoi(text)
	if err != nil || v*factor < least || v*factor > most {
		return 0, fault.Field("run", name, "is %q; write a number from %d to %d, k and m may follow", text, least, most)
	}
	return v * factor, nil
}

// result is the last line on standard output.
type result struct {
	Accepted       int     `json:"accepted"`
	Refused        int     `json:"refused"`
	Delivered      int     `json:"delivered"`
	Bounced        int     `json:"bounced"`
	InQueue        int64   `json:"in_queue"`
	DSN            int64   `json:"dsn"`
	Lost           int     `json:"lost"`
	Duplicated     int64   `json:"duplicated"`
	DKIMPass       int64   `json:"dkim_pass"`
	DKIMFail       int64   `json:"dkim_fail"`
	LimitBreaches  int64   `json:"limit_breaches"`
	ProtocolFaults int     `json:"protocol_faults"`
	AcceptedPerS   float64 `json:"accepted_per_s"`
	DeliveredPerS  float64 `json:"delivered_per_s"`
	Seconds        float64 `json:"seconds"`
	MessageBytes   int     `json:"message_bytes"`
	Seed           uint64  `json:"seed"`
	Lab            string  `json:"lab"`
	DKIM           bool    `json:"dkim"`
	FirstDelivery  float64 `json:"first_delivery_s"`
}

func run(ctx context.Context, o *options) (good bool, err error) {
	if o.dir == "" {
		dir, err := os.MkdirTemp("", "relais-run-")
		if err != nil {
			return false, err
		}
		o.dir = dir
		defer func() {
			// What went wrong has to be found in the logs; what went well
			// would only fill the disk.
			if good {
				_ = os.RemoveAll(dir)
			}
		}()
	}
	say := func(text string, args ...any) { fmt.Fprintf(os.Stderr, text+"\n", args...) }
	say("data      %s", o.dir)
	f, err := fleet.Start(ctx, fleet.Config{
		Bin: o.bin, Dir: o.dir, Relays: relays, Sources: sourcesPerRelay, Seed: o.seed, Open: o.open, NoDKIM: !o.dkim, Log: os.Stderr,
	})
	if err != nil {
		return false, err
	}
	defer func() {
		if err := f.Close(); err != nil {
			say("stopping: %v", err)
		}
	}()
	if err := exportCA(f.CAFile); err != nil {
		return false, err
	}
	r := f.Relays[0]
	say("try       swaks --server %s --tls-on-connect --tls-ca-path ca.pem --auth PLAIN --auth-user %s --auth-password %s --from you@%s --to accept-me@gmail.test",
		r.Submissions(), f.User, f.Secret, fleet.Domain)
	res, err := sample(ctx, f, o, say)
	if err != nil {
		return false, err
	}
	if !o.exit {
		say("\nMail keeps moving, %d messages a second, until Ctrl-C.", trickle)
		if err := keepMoving(ctx, f, o); err != nil {
			return false, err
		}
	}
	line, err := json.Marshal(res)
	if err != nil {
		return false, err
	}
	fmt.Println(string(line))
	return res.good(), nil
}

// good says whether every message is accounted for and no limit was breached.
func (r *result) good() bool {
	return r.Refused == 0 && r.InQueue == 0 && r.Accepted == r.Delivered+r.Bounced && r.Lost == 0 && r.Duplicated == 0 &&
		r.LimitBreaches == 0 && r.DKIMFail == 0 && r.ProtocolFaults == 0
}

func exportCA(from string) error {
	pem, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile("ca.pem", pem, 0o644)
}

func sample(ctx context.Context, f *fleet.Fleet, o *options, say func(string, ...any)) (*result, error) {
	recipients, err := f.Recipients(o.n)
	if err != nil {
		return nil, err
	}
	say("sending   %d messages of %d bytes", o.n, o.size)
	begun := time.Now()
	submitted, err := f.Submit(ctx, fleet.Stream{Recipients: recipients, Size: o.size, Connections: min(connections/relays, max(2, o.n/relays)), Tag: "run"})
	if err != nil {
		return nil, err
	}
	accepting := time.Since(begun)
	say("accepted  in %.1f s", accepting.Seconds())
	wait, cancel := context.WithTimeout(ctx, finalTimeout)
	defer cancel()
	shown := time.Now()
	err = f.WaitEmpty(wait, func(n int64) {
		if time.Since(shown) >= time.Second {
			shown = time.Now()
			rep := f.Lab.Report()
			say("moving    %6d in the queue, %6d accepted by providers, %4d deferrals", n, rep.Accepted, rep.Deferred)
		}
	})
	if err != nil {
		return nil, err
	}
	if o.dkim {
		if err := f.Lab.WaitFor(wait, func(r lab.Report) bool { return r.DKIM.Complete }); err != nil {
			return nil, err
		}
	}
	return account(ctx, f, o, submitted, begun, accepting)
}

// account compares what was accepted with what the providers hold and what the
// relays report.
func account(ctx context.Context, f *fleet.Fleet, o *options, submitted []fleet.Submitted, begun time.Time, accepting time.Duration) (*result, error) {
	ledger := f.NewLedger()
	bounced := make(map[string]int)
	if err := ledger.Read(ctx, func(_ *fleet.Relay, e *fleet.Event) {
		if e.Type == "bounced" || e.Type == "expired" || e.Type == "unknown" {
			bounced[e.Address]++
		}
	}); err != nil {
		return nil, err
	}
	rep := f.Lab.Report()
	res := &result{
		DSN: rep.NullSender, Duplicated: rep.Duplicated - rep.DuplicatedExcused, DKIMPass: rep.DKIM.Pass, DKIMFail: rep.DKIM.Fail + rep.DKIM.None,
		LimitBreaches: rep.LimitBreaches, ProtocolFaults: len(rep.ProtocolFaults), MessageBytes: o.size, Seed: o.seed, Lab: string(rep.Mode), DKIM: o.dkim,
	}
	if !o.dkim {
		res.DKIMFail = 0
	}
	for i := range submitted {
		s := &submitted[i]
		if s.Result.State != lab.StateAccepted {
			res.Refused++
			fmt.Fprintf(os.Stderr, "refused   <%s> %d %s\n", s.Recipient, s.Result.Code, s.Result.Reply)
			continue
		}
		res.Accepted++
		arrived := f.Lab.Deliveries(s.MessageID, s.Recipient) > 0
		switch {
		case arrived:
			res.Delivered++
		case bounced[s.Recipient] > 0:
			bounced[s.Recipient]--
			res.Bounced++
		default:
			res.Lost++
			fmt.Fprintf(os.Stderr, "lost      <%s> %s\n", s.Recipient, s.MessageID)
		}
	}
	var err error
	if res.InQueue, err = f.InQueue(ctx); err != nil {
		return nil, err
	}
	first, last := lastArrival(f)
	res.AcceptedPerS = float64(res.Accepted) / accepting.Seconds()
	if span := last.Sub(begun).Seconds(); span > 0 {
		res.DeliveredPerS = float64(res.Delivered) / span
		res.FirstDelivery = first.Sub(begun).Seconds()
	}
	res.Seconds = time.Since(begun).Seconds()
	for _, b := range rep.Breaches {
		fmt.Fprintf(os.Stderr, "breach    %s %s: %d of %s, allowed %d\n", b.Provider, b.Source, b.Seen, b.Limit, b.Allowed)
	}
	for _, p := range rep.ProtocolFaults {
		fmt.Fprintf(os.Stderr, "protocol  %s: %s (%d times) %s\n", p.Provider, p.Kind, p.Count, p.Detail)
	}
	return res, nil
}

// lastArrival returns when the first and the last mail of a client arrived.
func lastArrival(f *fleet.Fleet) (first, last time.Time) {
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				break
			}
			if m.From == "" {
				continue
			}
			if first.IsZero() || m.Received.Before(first) {
				first = m.Received
			}
			if m.Received.After(last) {
				last = m.Received
			}
		}
	}
	return first, last
}

// keepMoving sends a trickle until ctx ends.
func keepMoving(ctx context.Context, f *fleet.Fleet, o *options) error {
	recipients, err := f.Recipients(1000)
	if err != nil {
		return err
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for round := 0; ; round++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		at := round * trickle % len(recipients)
		if _, err := f.Submit(ctx, fleet.Stream{Recipients: recipients[at : at+trickle], Size: o.size, Connections: 2, Tag: "live" + strconv.Itoa(round)}); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "run:", err)
		}
		if n, err := f.InQueue(ctx); err == nil {
			rep := f.Lab.Report()
			fmt.Fprintf(os.Stderr, "moving    %6d in the queue, %6d accepted by providers, %4d deferrals, %4d refusals, %d limits breached\n",
				n, rep.Accepted, rep.Deferred, rep.Rejected, rep.LimitBreaches)
		}
	}
}
