package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

// scopeFlags adds the flags that narrow a credential. The result reads the files
// that they name.
func scopeFlags(cmd *cobra.Command, scope *api.CredentialScope) func() error {
	var certificates []string
	cmd.Flags().StringSliceVar(&scope.Domains, "domain", nil, "sending domain that From must be at or below; may be repeated (default: all of the tenant)")
	cmd.Flags().StringSliceVar(&scope.Networks, "cidr", nil, "network that clients must be in; may be repeated (default: all)")
	cmd.Flags().Uint32Var(&scope.MessagesPerHour, "rate", 0, "messages that each relay takes in any 60 minutes (default: no limit)")
	cmd.Flags().StringSliceVar(&certificates, "require-client-cert", nil, "certificate that the client must show in TLS, or of the CA that issued it and is shown with it: its SHA-256 fingerprint, or a PEM file; may be repeated, then one of them")
	return func() error {
		for _, text := range certificates {
			fingerprint, err := fingerprintOf(text)
			if err != nil {
				return err
			}
			scope.Certificates = append(scope.Certificates, fingerprint)
		}
		return nil
	}
}

// fingerprintOf returns a fingerprint as it was written, or that of the first
// certificate in a file.
func fingerprintOf(text string) (string, error) {
	if sum, err := hex.DecodeString(strings.ReplaceAll(text, ":", "")); err == nil && len(sum) == sha256.Size {
		return hex.EncodeToString(sum), nil
	}
	raw, err := os.ReadFile(text)
	if err != nil {
		return "", usagef("--require-client-cert: %q is neither a SHA-256 fingerprint nor a file that can be read: %v", text, err)
	}
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "CERTIFICATE" {
		return "", usagef("--require-client-cert: %s holds no certificate in PEM", text)
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return "", usagef("--require-client-cert: the certificate in %s cannot be read: %v", text, err)
	}
	sum := sha256.Sum256(block.Bytes)
	return hex.EncodeToString(sum[:]), nil
}

// scopeText says on one line what a credential is good for.
func scopeText(s *api.CredentialScope) string {
	var words []string
	if len(s.Domains) > 0 {
		words = append(words, "from="+strings.Join(s.Domains, ","))
	}
	if len(s.Networks) > 0 {
		words = append(words, "clients="+strings.Join(s.Networks, ","))
	}
	if s.MessagesPerHour > 0 {
		words = append(words, "rate="+strconv.FormatUint(uint64(s.MessagesPerHour), 10)+"/h")
	}
	if n := len(s.Certificates); n > 0 {
		words = append(words, "certificates="+strconv.Itoa(n))
	}
	if len(words) == 0 {
		return "-"
	}
	return strings.Join(words, " ")
}
