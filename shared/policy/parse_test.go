package policy

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

func defaultDocument(t testing.TB) Document {
	t.Helper()
	doc, err := Parse(nil)
	if err != nil {
		t.Fatalf("the shipped policy is not valid: %v", err)
	}
	return doc
}

func TestShippedDefaults(t *testing.T) {
	doc := defaultDocument(t)
	m := func(n int) Duration { return Duration(n) * minute }
	if want := []Duration{m(5), m(10), m(20), m(30)}; !reflect.DeepEqual(doc.Queue.Retry, want) {
		t.Errorf("retry = %v, want %v", doc.Queue.Retry, want)
	}
	for _, tc := range []struct {
		name      string
		got, want any
	}{
		{"retry_max", doc.Queue.RetryMax, 4 * hour},
		{"retry_jitter_percent", doc.Queue.RetryJitterPercent, 20},
		{"greylist_retry", doc.Queue.GreylistRetry, m(5)},
		{"expire_bulk", doc.Queue.ExpireBulk, 4*day + 12*hour},
		{"expire_transactional", doc.Queue.ExpireTransactional, day},
		{"delay_notice", doc.Queue.DelayNotice, 4 * hour},
		{"in_doubt_retry", doc.Queue.InDoubtRetry, hour},
		{"max_message_bytes", doc.Submission.MaxMessageBytes, int64(25 << 20)},
		{"max_recipients", doc.Submission.MaxRecipients, 1000},
		{"max_line_bytes", doc.Submission.MaxLineBytes, 998},
		{"final_dot_timeout", doc.Delivery.FinalDotTimeout, m(10)},
		{"max_sessions", doc.Delivery.MaxSessions, 2000},
		{"min_free_bytes", doc.Storage.MinFreeBytes, int64(1 << 30)},
		{"min_free_inodes", doc.Storage.MinFreeInodes, int64(10_000)},
		{"reserve_bytes", doc.Storage.ReserveBytes, int64(256 << 20)},
		{"segment_bytes", doc.Storage.SegmentBytes, int64(256 << 20)},
		{"max_outbox_bytes", doc.Storage.MaxOutboxBytes, int64(1 << 30)},
	} {
		if tc.got != tc.want {
			t.Errorf("%s = %v, want %v", tc.name, tc.got, tc.want)
		}
	}
	if n := len(doc.Streams.Stream); n != 2 {
		t.Fatalf("%d built-in streams, want 2", n)
	}
	for i, kind := range []StreamKind{Transactional, Bulk} {
		want := Stream{Tenant: "*", Project: "*", Name: string(kind), Kind: kind, Pool: "default"}
		if got := doc.Streams.Stream[i]; got != want {
			t.Errorf("stream %d = %+v, want %+v", i, got, want)
		}
	}
}

// Every key must be stated and explained in the shipped text, because that text
// is the reference that operators edit.
func TestShippedTextStatesEveryKey(t *testing.T) {
	var doc Document
	for _, s := range sections {
		text := DefaultSection(s.name)
		if text == "" {
			t.Fatalf("section %s has no shipped text", s.name)
		}
		var check func(reflect.Type)
		check = func(typ reflect.Type) {
			for name, f := range tagged(typ) {
				if !strings.Contains(text, name) {
					t.Errorf("section %s: key %s is not in the shipped text", s.name, name)
				}
				if f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct {
					check(f.Type.Elem())
				}
			}
		}
		check(reflect.TypeOf(s.of(&doc)).Elem())
	}
	if DefaultSection("nothing") != "" || DefaultSection("../parse") != "" {
		t.Error("a name that is no section must have no text")
	}
}

func TestOverlayReplacesOnlyWhatIsStated(t *testing.T) {
	base := defaultDocument(t)
	doc, err := Parse(map[string]string{
		"queue":     "retry = [\"1s\", \"90s\"]\nexpire_bulk = \"1d\"",
		"providers": "[[limit]]\nprovider = \"orange\"\nkind = \"connections\"\nscope = \"source\"\nmax = 1",
		"delivery":  "sign_dkim = false",
		"storage":   "",
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []Duration{second, 90 * second}; !reflect.DeepEqual(doc.Queue.Retry, want) {
		t.Errorf("retry = %v, want %v: a list is replaced as a whole", doc.Queue.Retry, want)
	}
	if doc.Queue.ExpireBulk != day || doc.Queue.ExpireTransactional != base.Queue.ExpireTransactional {
		t.Errorf("queue = %+v: only the stated keys may change", doc.Queue)
	}
	if doc.Delivery.SignDKIM || doc.Delivery.MaxSessions != base.Delivery.MaxSessions {
		t.Errorf("delivery = %+v", doc.Delivery)
	}
	if len(doc.Providers.Provider) != len(base.Providers.Provider) || len(doc.Providers.Limit) != 1 {
		t.Error("an override must leave the shipped profiles alone")
	}
	if doc.Storage != base.Storage {
		t.Error("an empty section must change nothing")
	}
	again := defaultDocument(t)
	if !reflect.DeepEqual(base, again) {
		t.Error("a parse changed the defaults of the next one")
	}
}

// The corpus: testdata/good and testdata/bad hold SECTION.what.toml files. The
// first line of a bad one is "# want: " and parts of the error separated by |.
func TestCorpus(t *testing.T) {
	for _, dir := range []string{"good", "bad"} {
		files, err := filepath.Glob(filepath.Join("testdata", dir, "*.toml"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no corpus in %s: %v", dir, err)
		}
		for _, file := range files {
			t.Run(dir+"/"+filepath.Base(file), func(t *testing.T) {
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				section, _, _ := strings.Cut(filepath.Base(file), ".")
				doc, err := Parse(map[string]string{section: string(text)})
				if dir == "good" {
					if err != nil {
						t.Fatal(err)
					}
					if err := doc.Validate(); err != nil {
						t.Errorf("parsed, but not valid: %v", err)
					}
					return
				}
				if !fault.Is(err, fault.Invalid) {
					t.Fatalf("error is %v, want an invalid fault", err)
				}
				first, _, _ := strings.Cut(string(text), "\n")
				want, ok := strings.CutPrefix(first, "# want: ")
				if !ok {
					t.Fatal("the first line must say what is wanted")
				}
				for part := range strings.SplitSeq(want, "|") {
					if !strings.Contains(fault.Public(err), part) {
						t.Errorf("error %q lacks %q", fault.Public(err), part)
					}
				}
			})
		}
	}
}

func TestParseRefusesSections(t *testing.T) {
	_, err := Parse(map[string]string{"quue": "x = 1"})
	if !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), "quue: is not a section") {
		t.Errorf("unknown section: %v", err)
	}
	_, err = Parse(map[string]string{"queue": strings.Repeat("# long\n", MaxSectionBytes/7+1)})
	if !fault.Is(err, fault.TooLarge) {
		t.Errorf("oversized section: %v", err)
	}
}

func TestManyProblemsAreToldAtOnceAndBounded(t *testing.T) {
	var text strings.Builder
	for i := range 30 {
		fmt.Fprintf(&text, "[[stream]]\ntenant = \"*\"\nproject = \"*\"\nname = \"s%d\"\nkind = \"x\"\npool = \"default\"\n", i)
	}
	_, err := Parse(map[string]string{"streams": text.String()})
	public := fault.Public(err)
	for _, part := range []string{"30 problems: ", "streams.stream[0].kind: ", "streams.stream[19].kind: ", "and 10 more"} {
		if !strings.Contains(public, part) {
			t.Errorf("%q lacks %q", public, part)
		}
	}
	if strings.Contains(public, "stream[20]") {
		t.Error("more than 20 problems were told")
	}
}

func TestDurations(t *testing.T) {
	for _, tc := range []struct {
		text string
		want time.Duration
		form string
	}{
		{"0", 0, "0s"}, {"0s", 0, "0s"}, {"90s", 90 * time.Second, "1m30s"}, {"5m", 5 * time.Minute, "5m"},
		{"4d12h", 108 * time.Hour, "4d12h"}, {"250ms", 250 * time.Millisecond, "250ms"}, {"1d1ms", 24*time.Hour + time.Millisecond, "1d1ms"},
		{"366d", 366 * 24 * time.Hour, "366d"},
	} {
		d, err := ParseDuration(tc.text)
		if err != nil || d.D() != tc.want || d.String() != tc.form {
			t.Errorf("ParseDuration(%q) = %v, %v; want %v", tc.text, d, err, tc.form)
		}
	}
	for _, text := range []string{"", "5", "m", "5 m", "-5m", "1.5h", "5m5m", "5s1m", "1y", "367d", "366d1s", "99999999999999999999s", "9223372036854775807h", "5µs", "1h ", strings.Repeat("0", 40) + "s"} {
		if d, err := ParseDuration(text); !fault.Is(err, fault.Invalid) {
			t.Errorf("ParseDuration(%q) = %v, %v; want an invalid fault", text, d, err)
		}
	}
}

func FuzzDuration(f *testing.F) {
	for _, s := range []string{"4d12h", "90s", "0", "1ms", "9d9h9m9s9ms", "5"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDuration(text)
		if err != nil {
			return
		}
		if d < 0 || d > MaxDuration {
			t.Fatalf("%q gave %d, out of range", text, d)
		}
		if back, err := ParseDuration(d.String()); err != nil || back != d {
			t.Fatalf("%q → %v → %v, %v", text, d, back, err)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, dir := range []string{"good", "bad"} {
		files, _ := filepath.Glob(filepath.Join("testdata", dir, "*.toml"))
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil {
				section, _, _ := strings.Cut(filepath.Base(file), ".")
				f.Add(section, string(text))
			}
		}
	}
	f.Fuzz(func(t *testing.T, section, text string) {
		doc, err := Parse(map[string]string{section: text})
		if err != nil {
			if k := fault.KindOf(err); k != fault.Invalid && k != fault.TooLarge {
				t.Fatalf("kind %v for %q: %v", k, text, err)
			}
			if fault.Public(err) == "" {
				t.Fatalf("no public text for %q", text)
			}
			return
		}
		if err := doc.Validate(); err != nil {
			t.Fatalf("Parse gave a document that is not valid: %v", err)
		}
		if _, err := Compile(&View{Document: doc}); err != nil {
			t.Fatalf("a valid document does not compile: %v", err)
		}
	})
}

// TestDurationFlag: commands read lengths of time as documents do.
func TestDurationFlag(t *testing.T) {
	var d time.Duration
	f := (*DurationFlag)(&d)
	if f.String() != "" || f.Type() != "duration" {
		t.Errorf("none is shown as %q of type %q", f, f.Type())
	}
	if err := f.Set("4d12h"); err != nil || d != 108*time.Hour || f.String() != "4d12h" {
		t.Errorf("got %v, shown as %q, %v", d, f, err)
	}
	for _, text := range []string{"", "-1s", "1.5h", "2w"} {
		if err := f.Set(text); err == nil || d != 108*time.Hour {
			t.Errorf("%q is taken as %v", text, d)
		}
	}
	if err := f.Set("2w"); err == nil || !strings.HasPrefix(err.Error(), `"2w" is not a duration: `) {
		t.Errorf("got %v", err)
	}
}
