package policy

import (
	"strings"
	"testing"
)

func TestSignAlgorithmsOfProviders(t *testing.T) {
	section := func(line string) map[string]string {
		return map[string]string{"providers": "[[provider]]\nname = \"strict\"\nmx_suffixes = [\"strict.test\"]\nmx_examples = [\"mx.strict.test\"]\n" + line}
	}
	for line, want := range map[string]string{
		"": "", "sign_algorithms = []\n": "", "sign_algorithms = [\"rsa-sha256\"]\n": AlgorithmRSA, "sign_algorithms = [\"ed25519-sha256\"]\n": AlgorithmEd25519,
		"sign_algorithms = [\"ed25519-sha256\", \"rsa-sha256\"]\n": "",
	} {
		doc, err := Parse(section(line))
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		d, err := Compile(&View{Document: doc})
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if p, ok := d.Providers().Named("strict"); !ok || p.OnlySignature() != want {
			t.Errorf("%q: got %+v, want %q", line, p, want)
		}
	}
	doc, err := Parse(section("sign_algorithms = [\"rsa-sha1\"]\n"))
	if err == nil {
		_, err = Compile(&View{Document: doc})
	}
	if err == nil || !strings.Contains(err.Error(), "sign_algorithms") {
		t.Errorf("rsa-sha1: %v", err)
	}
}
