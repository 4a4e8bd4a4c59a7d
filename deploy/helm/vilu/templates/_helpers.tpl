{{- define "vilu.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "vilu.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vilu.labels" -}}
{{ include "vilu.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vilu.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{- define "vilu.serviceAccount" -}}
{{- if .Values.serviceAccount.name }}{{ .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create }}{{ include "vilu.name" . }}
{{- else }}default{{ end }}
{{- end }}

{{- /* What values.schema.json cannot say: values that each make sense, but not together. */ -}}
{{- define "vilu.check" -}}
{{- with .Values }}
{{- if and (eq .model.source "uri") (not (regexMatch "^(s3|gs)://[^/]+(/.*)?$" .model.uri)) }}
{{- fail "model.source is uri: model.uri must be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER" }}
{{- end }}
{{- if and (eq .classSets.source "configMap") (not .classSets.configMap.files) }}
{{- fail "classSets.source is configMap: classSets.configMap.files must name its keys, as pets.1: pets@1" }}
{{- end }}
{{- if and .auth.control.secretName (ne .classSets.source "persistentVolumeClaim") }}
{{- fail "auth.control: class sets can be put only where classSets.source is persistentVolumeClaim, which all replicas share" }}
{{- end }}
{{- if and .tls.clientCA (not .tls.secretName) }}
{{- fail "tls.clientCA needs tls.secretName" }}
{{- end }}
{{- if and (ne .autoscaling.kind "none") (lt (int .autoscaling.maxReplicas) (int .autoscaling.minReplicas)) }}
{{- fail "autoscaling.maxReplicas is below autoscaling.minReplicas" }}
{{- end }}
{{- if le (int .terminationGracePeriodSeconds) (add (int .drainSeconds) 10) }}
{{- fail "terminationGracePeriodSeconds must be more than drainSeconds and the 10 s that tritonserver has to end" }}
{{- end }}
{{- end }}
{{- end }}
