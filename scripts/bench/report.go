package main

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
)

// report gathers the results of all rounds.
type report struct {
	machine  machine
	options  *options
	cells    []*result
	signing  time.Duration // what the two bare signatures of a mail cost; 0: not measured
	signings int           // measurements of that
}

func (r *report) add(c *result) { r.cells = append(r.cells, c) }

// good says whether nothing was lost.
func (r *report) good() bool {
	return !slices.ContainsFunc(r.cells, func(c *result) bool { return c.Lost > 0 })
}

// medians returns a result for every system and case, over the rounds.
func (r *report) medians() []*result {
	var out []*result
	for _, c := range r.options.cases {
		for _, system := range r.options.systems {
			var rounds []*result
			for _, cell := range r.cells {
				if cell.System == system && cell.Case == c.name {
					rounds = append(rounds, cell)
				}
			}
			if len(rounds) == 0 {
				continue
			}
			m := &result{System: system, Case: c.name, policy: rounds[0].policy}
			m.AcceptedPerS = median(rounds, func(c *result) float64 { return c.AcceptedPerS }, 0)
			m.DeliveredPerS = median(rounds, func(c *result) float64 { return c.DeliveredPerS }, 0)
			m.CPU = median(rounds, func(c *result) float64 { return c.CPU }, 3)
			m.RSS = median(rounds, func(c *result) float64 { return c.RSS }, 0)
			m.P50 = median(rounds, func(c *result) float64 { return c.P50 }, 1)
			m.P99 = median(rounds, func(c *result) float64 { return c.P99 }, 1)
			for _, cell := range rounds { // every single one counts
				m.Lost += cell.Lost
				m.Duplicated += cell.Duplicated
				m.Messages += cell.Messages
			}
			out = append(out, m)
		}
	}
	return out
}

// median rounds to so many decimals.
func median(rounds []*result, of func(*result) float64, decimals int) float64 {
	values := make([]float64, 0, len(rounds))
	for _, c := range rounds {
		values = append(values, of(c))
	}
	slices.Sort(values)
	v := values[len(values)/2]
	if len(values)%2 == 0 {
		v = (v + values[len(values)/2-1]) / 2
	}
	return round(v, decimals)
}

func round(v float64, decimals int) float64 {
	p := math.Pow(10, float64(decimals))
	return math.Round(v*p) / p
}

// ratios compares Relais with the others in one case; above 1 Relais is
// better, but for cpu_of_null and dkim_of_bare, which are what it costs.
type ratios struct {
	DeliveredToPostfix float64 `json:"delivered_relais_to_postfix,omitempty"`
	DeliveredToHaraka  float64 `json:"delivered_relais_to_haraka,omitempty"`
	CPUOfPostfix       float64 `json:"cpu_postfix_to_relais,omitempty"`
	CPUOfHaraka        float64 `json:"cpu_haraka_to_relais,omitempty"`
	CPUToNull          float64 `json:"cpu_relais_to_null,omitempty"`
	SigningToBare      float64 `json:"cpu_signing_to_bare_signatures,omitempty"`
}

func (r *report) ratios(medians []*result) map[string]ratios {
	out := make(map[string]ratios)
	for _, c := range r.options.cases {
		by := make(map[string]*result)
		for _, m := range medians {
			if m.Case == c.name {
				by[m.System] = m
			}
		}
		own, ok := by["relais"]
		if !ok {
			continue
		}
		var q ratios
		if p, ok := by["postfix"]; ok {
			q.DeliveredToPostfix, q.CPUOfPostfix = round(own.DeliveredPerS/p.DeliveredPerS, 2), round(p.CPU/own.CPU, 2)
		}
		if h, ok := by["haraka"]; ok {
			q.DeliveredToHaraka, q.CPUOfHaraka = round(own.DeliveredPerS/h.DeliveredPerS, 2), round(h.CPU/own.CPU, 2)
		}
		if n, ok := by["null"]; ok {
			q.CPUToNull = round(own.CPU/n.CPU, 2)
		}
		if d, ok := by["relais-dkim"]; ok && r.signing > 0 {
			q.SigningToBare = round((d.CPU-own.CPU)/(float64(r.signing.Microseconds())/1000), 2)
		}
		out[c.name] = q
	}
	return out
}

// print writes the policies, a table, a JSON object for each system and case,
// and the ratios.
func (r *report) print(w io.Writer) error {
	medians := r.medians()
	if _, err := io.WriteString(w, r.setting()+"\n"); err != nil {
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "case\tsystem\taccepted/s\tdelivered/s\tCPU ms/msg\tRSS MiB\tp50 ms\tp99 ms\tlost\tduplicated\t")
	for _, m := range medians {
		fmt.Fprintf(table, "%s\t%s\t%.0f\t%.0f\t%.3f\t%.0f\t%.1f\t%.1f\t%d\t%d\t\n", m.Case, m.System, m.AcceptedPerS, m.DeliveredPerS, m.CPU, m.RSS, m.P50, m.P99, m.Lost, m.Duplicated)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	lines := json.NewEncoder(w)
	for _, m := range medians {
		if err := lines.Encode(m); err != nil {
			return err
		}
	}
	return lines.Encode(map[string]any{"ratios": r.ratios(medians)})
}

// setting tells what the numbers stand for.
func (r *report) setting() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d cores, %s; %s; queues on %s; load average before it began %s\n", r.machine.CPU, r.machine.Cores, r.machine.Memory, r.machine.Kernel, r.machine.Disk, r.machine.Load)
	fmt.Fprintf(&b, "%d connections, %d destination domains, one recipient a message, plaintext; %d rounds, medians\n", connections, domains, r.options.rounds)
	if r.signing > 0 {
		fmt.Fprintf(&b, "bare signatures, RSA-2048 and Ed25519: %.3f ms a message\n", float64(r.signing.Microseconds())/1000)
	}
	for _, system := range r.options.systems {
		for _, c := range r.cells {
			if c.System == system && c.policy != "" {
				fmt.Fprintf(&b, "\n%s, beside its defaults:\n%s", system, indent(c.policy))
				break
			}
		}
	}
	return b.String()
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n  ") + "\n"
}

// The generated section of a document stands between these lines.
const (
	docBegin = "<!-- generated by make bench: begin -->"
	docEnd   = "<!-- generated by make bench: end -->"
)

// document replaces the generated section of the file.
func (r *report) document(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	out, err := replaceSection(string(text), r.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, []byte(out), 0o644)
}

func replaceSection(text, section string) (string, error) {
	head, rest, ok := strings.Cut(text, docBegin)
	if !ok {
		return "", fmt.Errorf("has no line %q", docBegin)
	}
	_, tail, ok := strings.Cut(rest, docEnd)
	if !ok {
		return "", fmt.Errorf("has no line %q", docEnd)
	}
	return head + docBegin + "\n" + section + docEnd + tail, nil
}

// durability says what an acceptance means.
var durability = map[string]string{
	"postfix": "file synced", "haraka": "file synced", "null": "nothing kept", "relais": "body, record and names synced", "relais-dkim": "body, record and names synced",
}

func (r *report) markdown() string {
	medians := r.medians()
	var b strings.Builder
	fmt.Fprintf(&b, "\nMeasured %s: %s, %d cores, %s of memory, %s, queues on %s; load average before it began %s. %d rounds of about %d seconds, medians.\n\n",
		time.Now().UTC().Format("2006-01-02"), r.machine.CPU, r.machine.Cores, r.machine.Memory, r.machine.Kernel, r.machine.Disk, r.machine.Load, r.options.rounds, r.options.seconds)
	b.WriteString("| size | system | kept before 250 | accepted/s | delivered/s | CPU ms a message | memory MiB | p50 ms | p99 ms | lost | duplicated |\n| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, m := range medians {
		fmt.Fprintf(&b, "| %s | %s | %s | %.0f | %.0f | %.3f | %.0f | %.1f | %.1f | %d | %d |\n", m.Case, m.System, durability[m.System], m.AcceptedPerS, m.DeliveredPerS, m.CPU, m.RSS, m.P50, m.P99, m.Lost, m.Duplicated)
	}
	b.WriteString("\n| size | delivered/s: Relais to Postfix | to Haraka | CPU: Postfix to Relais | Haraka to Relais | CPU: Relais to null | signing to bare signatures |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	all := r.ratios(medians)
	for _, c := range r.options.cases {
		if q, ok := all[c.name]; ok {
			fmt.Fprintf(&b, "| %s | %.1f | %.1f | %.1f | %.1f | %.2f | %.2f |\n", c.name, q.DeliveredToPostfix, q.DeliveredToHaraka, q.CPUOfPostfix, q.CPUOfHaraka, q.CPUToNull, q.SigningToBare)
		}
	}
	if r.signing > 0 {
		fmt.Fprintf(&b, "\nThe two bare signatures cost %.3f ms.\n", float64(r.signing.Microseconds())/1000)
	}
	b.WriteString("\n")
	return b.String()
}

// signingTime is how long bare signatures are made, of the CPU time of each processor.
const signingTime = 250 * time.Millisecond

// addBareSigning measures beside a measurement what r.signing is the mean of: how
// fast a processor is changes within a run, on machines that others use too.
func (r *report) addBareSigning() error {
	d, err := bareSigning()
	if err != nil {
		return err
	}
	r.signings++
	r.signing += (d - r.signing) / time.Duration(r.signings)
	return nil
}

// bareSigning measures the CPU time that an RSA-2048 and an Ed25519 signature
// cost together while all processors make some, as they do in a relay at its
// limit: two threads of one core are slower than one alone.
func bareSigning() (time.Duration, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return 0, err
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return 0, err
	}
	digest := sha256.Sum256([]byte(bodyLine))
	var signers errgroup.Group
	var took, signed atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		signers.Go(func() error {
			runtime.LockOSThread() // whose time is counted
			defer runtime.UnlockOSThread()
			begin, n := threadTime(), int64(0)
			for threadTime()-begin < signingTime {
				if _, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:]); err != nil {
					return err
				}
				_ = ed25519.Sign(edKey, digest[:])
				n++
			}
			took.Add(int64(threadTime() - begin))
			signed.Add(n)
			return nil
		})
	}
	if err := signers.Wait(); err != nil {
		return 0, err
	}
	return time.Duration(took.Load() / signed.Load()), nil
}

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	const thread = 1 // RUSAGE_THREAD
	var u syscall.Rusage
	if err := syscall.Getrusage(thread, &u); err != nil {
		return time.Duration(time.Now().UnixNano()) // never on Linux
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
